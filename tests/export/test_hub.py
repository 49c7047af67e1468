"""`resolve_model` against the real client library talking to a hub of our own on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from neo_export.checkpoint.hub import resolve_model, resolve_tokenizer
from neo_export.command.cli import main
from neo_runtime.errors import CheckpointError, DependencyError, HubError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = {"config.json": b"{}", "tokenizer.json": b"{}", "README.md": b"#", "tf_model.h5": b"1"}
ONE = {"model.safetensors": b"weights"}
SHARDS = {"model.safetensors.index.json": b"{}", "model-00001-of-00001.safetensors": b"shard"}
BIN = {"pytorch_model.bin": b"pickle"}
BIN_SHARDS = {"pytorch_model.bin.index.json": b"{}", "pytorch_model-00001-of-00001.bin": b"p"}
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "owner/all": SMALL | ONE | SHARDS | BIN | BIN_SHARDS | {"model.fp16.safetensors": b"16"},
    "owner/shards": SMALL | SHARDS | BIN,
    "owner/bin": SMALL | BIN | BIN_SHARDS,
    "owner/bin-shards": SMALL | BIN_SHARDS,
    "owner/adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"a"},
}


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as `snapshot_download` uses."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:])
        else:  # owner/name/resolve/revision/file
            self._file(REPOSITORIES["/".join(parts[:2])][parts[-1]])

    def do_HEAD(self) -> None:
        self.do_GET()

    def _api(self, repository: str, rest: list[str]) -> None:
        if repository == "owner/gated":
            return self._send(403, {"X-Error-Code": "GatedRepo"})
        if repository == "owner/broken":
            return self._send(400)
        if repository not in REPOSITORIES:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        if rest[-1] not in ("main", "v1", COMMIT, repository.split("/")[1]):
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        files = REPOSITORIES[repository]
        body: Any = {
            "id": repository,
            "sha": COMMIT,
            "siblings": [{"rfilename": name} for name in files],
        }
        if rest[0] == "tree":
            body = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                for name, data in files.items()
            ]
        return self._send(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def _file(self, data: bytes) -> None:
        self._send(200, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT}, data)

    def _send(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _point_at(endpoint: str, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """The library reads its environment once, at import; these are what it keeps of it."""
    patch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    patch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    patch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A running hub; the paths that it was asked for."""
    asked: list[str] = []
    handler = type("Handler", (Hub,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        _point_at(f"http://127.0.0.1:{server.server_port}", tmp_path / "cache", monkeypatch)
        monkeypatch.chdir(tmp_path)
        yield asked
        server.shutdown()
        thread.join()


SMALL_WANTED = {"config.json", "tokenizer.json"}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("owner/all", SMALL_WANTED | ONE.keys()),
        ("owner/shards", SMALL_WANTED | SHARDS.keys()),
        ("owner/bin", SMALL_WANTED | BIN.keys()),
        ("owner/bin-shards", SMALL_WANTED | BIN_SHARDS.keys()),
        ("owner/adapter", {"adapter_config.json", "adapter_model.safetensors"}),
        ("owner/all@v1", SMALL_WANTED | ONE.keys()),
        (f"owner/all@{COMMIT}", SMALL_WANTED | ONE.keys()),
    ],
)
def test_downloads_the_weights_in_one_format(hub: list[str], name: str, wanted: set[str]) -> None:
    folder = resolve_model(name)
    assert {path.name for path in folder.iterdir()} == wanted
    for path in folder.iterdir():
        assert path.read_bytes() == REPOSITORIES[name.split("@")[0]][path.name]


def test_only_the_tokenizer_is_downloaded_for_its_own_sake(hub: list[str]) -> None:
    folder = resolve_tokenizer("owner/all")
    assert {path.name for path in folder.iterdir()} == {"tokenizer.json"}


def test_a_downloaded_model_is_there_offline(
    hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    online = {name: resolve_model(name) for name in ("owner/all", "owner/shards", "owner/bin")}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.clear()
    assert {name: resolve_model(name) for name in online} == online
    assert hub == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("owner/nothing", "owner/nothing is neither a folder here nor a public model.*HF_TOKEN"),
        ("owner/gated", r"owner/gated .*is gated; accept its terms.*HF_TOKEN"),
        ("owner/all@nope", "has no revision 'nope'; expected a branch, tag or commit"),
        ("owner/two--dashes", "'owner/two--dashes' is not a valid Hugging Face id"),
        ("owner/broken", "owner/broken .*cannot be (reached|downloaded).*give the folder"),
    ],
)
def test_what_the_hub_refuses(hub: list[str], name: str, words: str) -> None:
    with pytest.raises(HubError, match=words) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)


def test_offline_without_a_copy(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="not in the local cache, and HF_HUB_OFFLINE is set; unset"):
        resolve_model("owner/all")
    assert hub == []


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _point_at("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)  # nobody listens there
    with pytest.raises(HubError, match=r"cannot be reached and is not in the local.*the network"):
        resolve_model("owner/all")


def test_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args: Any, **kwargs: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OutputError, match=r"does not fit on the disk.*HF_HOME"):
        resolve_model("owner/all")


def test_an_unknown_error_of_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def strange(*args: Any, **kwargs: Any) -> str:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", strange)
    with pytest.raises(HubError, match=r"cannot be downloaded \(RuntimeError: first line\); check"):
        resolve_model("owner/all")


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("owner/name") == Path("owner/name")
    assert resolve_model("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize(
    "model",
    [
        "./owner/name",
        "/nowhere/at/all",
        "gpt2",
        "a/b/c",
        "../x",
        "~/x",
        "~nobody-of-that-name/x",
        "",
        "x/",
        "-x/y",
        "nul\0",
        "long" * 1000,
    ],
    ids=lambda model: repr(model[:9]),
)
def test_neither_a_folder_nor_an_id(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"does not exist; expected a Hugging Face model f"):
        resolve_model(model)


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file; expected the folder that holds config"):
        resolve_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("model", "package", "extra"),
    [
        ("owner/name", "huggingface_hub", "hub"),
        ("modelscope:owner/name", "modelscope", "modelscope"),
    ],
)
def test_the_library_is_missing(
    model: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError, match=rf"pip install 'neo-onnx\[{extra}\]'"):
        resolve_model(model)


class ModelScope:
    """Stands in for the package, which is large: its `snapshot_download`, of the same signature."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        self.folder, self.files = folder, files
        self.error: Exception | None = None
        self.asked: list[tuple[str, str | None]] = []

    def snapshot_download(
        self, model_id: str, revision: str | None = None, *, allow_file_pattern: list[str]
    ) -> str:
        if self.error is not None:
            raise self.error
        self.asked.append((model_id, revision))
        self.folder.mkdir(exist_ok=True)
        for name, data in self.files.items():
            if any(Path(name).match(pattern) for pattern in allow_file_pattern):
                (self.folder / name).write_bytes(data)
        return str(self.folder)


@pytest.fixture
def modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelScope:
    fake = ModelScope(tmp_path / "gpt-neo", SMALL | BIN)
    module = ModuleType("modelscope")
    module.__dict__["snapshot_download"] = fake.snapshot_download
    monkeypatch.setitem(sys.modules, "modelscope", module)
    return fake


def test_modelscope(modelscope: ModelScope) -> None:
    folder = resolve_model("modelscope:AI-ModelScope/gpt-neo-1B3@v2")
    assert {path.name for path in folder.iterdir()} == SMALL_WANTED | BIN.keys()
    assert set(modelscope.asked) == {("AI-ModelScope/gpt-neo-1B3", "v2")}


def test_modelscope_fails(modelscope: ModelScope) -> None:
    modelscope.error = ValueError("no such model\nand more")
    with pytest.raises(HubError, match=r"ModelScope \(ValueError: no such model\); check the id"):
        resolve_model("modelscope:owner/name")
    modelscope.error = OSError(errno.ENOSPC, "full")
    with pytest.raises(OutputError, match="MODELSCOPE_CACHE"):
        resolve_model("modelscope:owner/name")


@pytest.mark.parametrize("name", ["", "name", "owner/name/more", "../name", "owner/.."])
def test_no_modelscope_id(name: str) -> None:
    with pytest.raises(CheckpointError, match="is not a ModelScope id; expected modelscope:owner"):
        resolve_model(f"modelscope:{name}")


def test_an_empty_model_is_not_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a script whose variable is unset: the demo must not take a bundle's place."""
    assert main(["", "-o", str(tmp_path / "bundle"), "--force"]) == 2
    assert "'' does not exist; expected a Hugging Face model folder" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
