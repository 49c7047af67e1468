"""Prepacked weights on disk: shared, keyed, built once, and never the reason for a wrong answer."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers.bundles import record
from helpers.mappings import resident_pages
from helpers.models import TinyConfig, make_checkpoint
from helpers.running import relative_l2
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.targets import Quantization
from neo_export.tolerances import TOLERANCES
from neo_runtime.backends.cpu import backend as cpu_backend
from neo_runtime.backends.cpu import prepacked, sessions
from neo_runtime.backends.cpu.backend import OnnxRuntimeBackend
from neo_runtime.backends.cpu.prepacked import PrepackedCache, cache_root
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.bundle.manifest import Manifest
from neo_runtime.errors import BundleDamagedError, BundleError

if TYPE_CHECKING:
    from neo_runtime.backends.cpu.unused_memory import Mapping
    from numpy.typing import NDArray

CONFIG = TinyConfig(vocab_size=300, num_heads=4, head_dim=16, max_position_embeddings=48)
IDS = np.arange(7, 31)
PRECISIONS = ("int8", "int4")
GRAPHS = {"prefill", "decode", "score"}


@pytest.fixture(scope="module", params=PRECISIONS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_checkpoint(folder / "checkpoint", CONFIG)
    options = ExportOptions(precision=request.param, quantization=Quantization(block_size=32))
    export_bundle(str(folder / "checkpoint"), folder / "bundle", options)
    return folder / "bundle"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test, which is not there yet."""
    monkeypatch.setenv("NEO_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def answers(bundle: Path, **options: Any) -> NDArray[np.float32]:
    """Logits of all three graphs, from a model of its own."""
    with neo_runtime.load(bundle, threads=1, **options) as model:
        scored = model.logits(IDS)
        kept = model.new_cache(1, len(IDS) + 1)
        prompt = model.prefill(kept, [IDS]).copy()
        return np.concatenate([scored, prompt, model.decode(kept, [5])])


def key_folder(cache: Path) -> Path:
    [folder] = (cache / "prepacked").iterdir()
    return folder


def stored(cache: Path) -> dict[str, os.stat_result]:
    """Every file of the cache but locks, by its path."""
    found = (path for path in cache.rglob("*") if path.is_file() and path.name != "lock")
    return {path.relative_to(cache).as_posix(): path.stat() for path in found}


def inodes(cache: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written anew."""
    return {path: (status.st_ino, status.st_mtime_ns) for path, status in stored(cache).items()}


def test_same_answers_with_and_without(bundle: Path, cache: Path) -> None:
    without = answers(bundle, keep_prepacked=False)
    assert not cache.exists()
    building, using = answers(bundle), answers(bundle)
    assert np.array_equal(building, without)
    assert np.array_equal(using, without)


def test_built_once_and_used_after(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(bundle)
    assert {path.name for path in key_folder(cache).iterdir()} == {*GRAPHS, "lock"}
    before, opened = inodes(cache), []
    session = ort.InferenceSession

    def remember(path: str, *arguments: Any, **options: Any) -> Any:
        opened.append(Path(path))
        return session(path, *arguments, **options)

    monkeypatch.setattr(ort, "InferenceSession", remember)
    answers(bundle)
    assert inodes(cache) == before
    assert {path.stem for path in opened} == GRAPHS
    assert all(path.is_relative_to(cache) for path in opened)


def test_one_file_serves_all_graphs(bundle: Path, cache: Path) -> None:
    answers(bundle)
    weights = {s.st_ino: s.st_size for p, s in stored(cache).items() if p.endswith("prepacked.bin")}
    assert len(weights) == 1
    assert min(weights.values()) > (bundle / "weights.bin").stat().st_size


def test_float32_on_request(tmp_path: Path, cache: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", CONFIG)
    export_bundle(str(tmp_path / "checkpoint"), tmp_path / "bundle", ExportOptions())
    expected = answers(tmp_path / "bundle")
    assert not cache.exists()
    for _ in range(2):
        found = answers(tmp_path / "bundle", keep_prepacked=True)
        assert relative_l2(found, expected).max() <= TOLERANCES["fp32"].logits
    weights = [s.st_ino for p, s in stored(cache).items() if p.endswith("prepacked.bin")]
    assert len(weights) == len(GRAPHS)
    assert len(set(weights)) == 1


def test_size_counts_a_shared_file_once(bundle: Path, cache: Path) -> None:
    with neo_runtime.load(bundle, threads=1) as model:
        assert model.prepacked_bytes == 0
        model.logits(IDS)
        scored = model.prepacked_bytes
        model.prefill(model.new_cache(1, 32), [IDS])
        both = model.prepacked_bytes
    files = stored(cache)
    assert both == sum({s.st_ino: s.st_size for s in files.values()}.values())
    weights = next(s.st_size for path, s in files.items() if path.endswith("prepacked.bin"))
    assert scored > weights
    assert both - scored < weights
    with neo_runtime.load(bundle, threads=1, keep_prepacked=False) as model:
        assert model.prepacked_bytes == 0


@pytest.mark.parametrize("graph", sorted(GRAPHS))
def test_no_table_is_turned_while_running(bundle: Path, cache: Path, graph: str) -> None:
    """What is stored has rows of tokens: turning a whole table would cost more than a step."""
    answers(bundle)
    vocabulary = open_bundle(bundle).manifest.model.vocab_size
    stored_graph = onnx.load(key_folder(cache) / graph / f"{graph}.onnx", load_external_data=False)
    tables = {t.name for t in stored_graph.graph.initializer if vocabulary in t.dims}
    for node in stored_graph.graph.node:
        assert node.op_type != "Transpose" or not tables & set(node.input)
    rows = {t.name for t in stored_graph.graph.initializer if t.dims[:1] == [vocabulary]}
    gathers = [n for n in stored_graph.graph.node if n.op_type.startswith("Gather")]
    assert any(rows & set(node.input) for node in gathers)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("graph", sorted(GRAPHS))
def test_what_only_loading_read_is_not_kept_in_memory(
    bundle: Path, cache: Path, graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(bundle)
    weights = key_folder(cache) / graph / prepacked.WEIGHTS_FILE

    def resident() -> int:
        backend = OnnxRuntimeBackend(sessions.SessionFactory(open_bundle(bundle), threads=1))
        session = backend.session(graph)
        pages = resident_pages(weights)
        del session
        return pages

    assert resident() == 0
    named: list[Mapping] = []
    monkeypatch.setattr(sessions, "forget_pages", named.extend)
    assert resident() > 0, "loading reads them"
    library = Path(ort.capi.onnxruntime_pybind11_state.__file__)
    assert {library, weights} == {mapping.path for mapping in named}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_rows_of_tokens_leave_memory_behind_a_prompt(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of int8 as well, which has a column a token: a turned table is kept beside it."""

    def after_two_prompts() -> tuple[int, NDArray[np.float32]]:
        with neo_runtime.load(bundle, threads=1) as model, model.new_cache(1, 32) as kept:
            model.prefill(kept, [[1]])
            logits = model.prefill(kept, [IDS]).copy()
            return resident_pages(key_folder(cache) / "prefill" / prepacked.WEIGHTS_FILE), logits

    answers(bundle)
    pages, expected = after_two_prompts()
    monkeypatch.setattr(cpu_backend, "forget_pages", lambda mappings: None)
    more, found = after_two_prompts()
    assert pages < more
    assert np.array_equal(found, expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_model_forgets_nothing_that_another_one_mapped(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the other one is closed, anything may come to lie there, and would be zeroed."""
    answers(bundle)
    forgotten: list[Mapping] = []
    monkeypatch.setattr(sessions, "forget_pages", forgotten.extend)
    monkeypatch.setattr(cpu_backend, "forget_pages", forgotten.extend)
    backends = [
        OnnxRuntimeBackend(sessions.SessionFactory(open_bundle(bundle), threads=1))
        for _ in range(3)
    ]
    own: list[set[int]] = []
    for backend in (*backends, backends[0]):  # the first once more, beside all the others
        forgotten.clear()
        backend.session("prefill")
        with backend.prompt():
            pass
        own.append({m.start for m in forgotten if m.path.name == prepacked.WEIGHTS_FILE})
    assert all(own)
    assert own[3] <= own[0]
    assert len(own[0] | own[1] | own[2]) == sum(map(len, own[:3])), "no address twice"


def replaced(bundle: Path, folder: Path) -> Path:
    """Put another bundle of the same kind where this one is, as an export with --force does."""
    make_checkpoint(folder / "checkpoint", CONFIG, seed=1)
    options = ExportOptions(
        precision=open_bundle(bundle).manifest.precision, quantization=Quantization(block_size=32)
    )
    export_bundle(str(folder / "checkpoint"), bundle, replace(options, force=True))
    return bundle


def test_a_bundle_that_is_replaced_under_a_model_is_an_error(
    bundle: Path, cache: Path, tmp_path: Path
) -> None:
    live = Path(shutil.copytree(bundle, tmp_path / "live"))
    with neo_runtime.load(live, threads=1) as model:
        model.logits(IDS)
        replaced(live, tmp_path)
        assert model.logits(IDS).size, "a graph that is loaded stays"
        with (
            model.new_cache(1, 32) as kept,
            pytest.raises(BundleDamagedError, match="has changed since"),
        ):
            model.prefill(kept, [IDS])


def test_nothing_is_stored_of_a_bundle_that_was_replaced_meanwhile(
    bundle: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored counts as the bundle's, whose digest names it, wherever that lies later."""
    with monkeypatch.context() as patched:
        patched.setenv("NEO_CACHE_DIR", str(tmp_path / "elsewhere"))
        expected = answers(bundle)
    live = Path(shutil.copytree(bundle, tmp_path / "live"))
    open_session = sessions.SessionFactory._open

    def opened(factory: sessions.SessionFactory, path: Path, options: Any) -> Any:
        if path.is_relative_to(live):
            replaced(live, tmp_path)
        return open_session(factory, path, options)

    with monkeypatch.context() as patched:
        patched.setattr(sessions.SessionFactory, "_open", opened)
        with pytest.raises(BundleDamagedError, match="has changed since"):
            answers(live)
    assert stored(cache) == {}
    assert np.array_equal(answers(bundle), expected)


def test_a_cache_that_goes_while_it_is_opened(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session has mapped its files; only looking for tables of tokens finds none."""
    expected = answers(bundle)
    open_session = sessions.SessionFactory._open

    def opened(factory: sessions.SessionFactory, path: Path, options: Any) -> Any:
        session = open_session(factory, path, options)
        if path.is_relative_to(cache):
            shutil.rmtree(path.parent)
        return session

    monkeypatch.setattr(sessions.SessionFactory, "_open", opened)
    assert np.array_equal(answers(bundle), expected)


def test_nothing_is_forgotten_behind_close(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other memory may lie there by then."""
    forgotten: list[object] = []
    monkeypatch.setattr(cpu_backend, "forget_pages", forgotten.append)
    backend = OnnxRuntimeBackend(sessions.SessionFactory(open_bundle(bundle), threads=1))
    backend.session("prefill")
    with backend.prompt():
        pass
    assert len(forgotten) == 1
    with backend._lock, backend.prompt():  # as while a graph is loaded: a prompt does not wait
        pass
    assert len(forgotten) == 1
    backend.close()
    with backend.prompt():
        pass
    assert len(forgotten) == 1


def test_float32_keeps_none(mini_bundle: Path, cache: Path) -> None:
    with neo_runtime.load(mini_bundle, threads=1) as model:
        model.logits(IDS)
        assert model.prepacked_bytes == 0
    assert not cache.exists()


def test_deleted_while_loaded(bundle: Path, cache: Path) -> None:
    expected = answers(bundle)
    with neo_runtime.load(bundle, threads=1) as model:
        first = model.logits(IDS)
        shutil.rmtree(cache)
        assert np.array_equal(model.logits(IDS), first)
        kept = model.new_cache(1, 32)
        prompt = model.prefill(kept, [IDS])  # a graph that was not loaded yet
        assert np.array_equal(prompt[0], expected[len(IDS)])
    assert {path.split("/")[2] for path in stored(cache)} == {"prefill"}
    assert np.array_equal(answers(bundle), expected)
    assert {path.split("/")[2] for path in stored(cache)} == GRAPHS


def test_deleted_just_before_it_is_read(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody empties the folder between the look and the load: the bundle's own graph serves."""
    expected = answers(bundle)
    look = PrepackedCache.graph

    def look_and_lose(self: PrepackedCache, name: str, build: Any, **options: Any) -> Path | None:
        path = look(self, name, build, **options)
        shutil.rmtree(self.folder)
        return path

    monkeypatch.setattr(PrepackedCache, "graph", look_and_lose)
    np.testing.assert_array_equal(answers(bundle), expected)


@pytest.mark.parametrize("kind", ["file", "read-only"])
def test_unwritable_folder(
    kind: str, bundle: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Costs speed, and says so."""
    if kind == "file":
        cache.write_text("in the way")
    else:
        cache.mkdir(mode=0o500)
        if os.access(cache, os.W_OK):
            pytest.skip("this user may write anywhere")
    expected = answers(bundle, keep_prepacked=False)
    with caplog.at_level(logging.WARNING, "neo_runtime"):
        found = answers(bundle)
    assert np.array_equal(found, expected)
    [once] = caplog.records
    message = once.getMessage()
    assert str(cache) in message
    assert "loading is slower" in message
    assert "NEO_CACHE_DIR" in message


DISK_FULL = """
import logging, resource, sys
import neo_runtime
logging.basicConfig()
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
with neo_runtime.load(sys.argv[1], threads=1) as model:
    print(model.logits(range(7, 31)).argmax(axis=1).tolist(), model.prepacked_bytes)
"""


def test_disk_full(bundle: Path, cache: Path) -> None:
    """onnxruntime fails to write its file: the same answers, a warning, and nothing left."""
    result = _python(DISK_FULL, str(bundle))
    expected = answers(bundle, keep_prepacked=False)[: len(IDS)].argmax(axis=1).tolist()
    assert result.stdout.split("\n")[0] == f"{expected} 0"
    assert "is the disk full?" in result.stderr
    assert not stored(cache)


def test_a_bundle_that_cannot_be_loaded_is_the_bundles_fault(
    bundle: Path, cache: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "broken")
    path = tmp_path / "broken" / "score.onnx"
    path.write_bytes(path.read_bytes().replace(b"LayerNorm", b"LaierNorm"))
    manifest = Manifest.from_json((bundle / "neo.json").read_text())
    files = {**manifest.files, "score.onnx": record(path)}
    (tmp_path / "broken" / "neo.json").write_text(replace(manifest, files=files).to_json())
    with (
        neo_runtime.load(tmp_path / "broken", threads=1) as model,
        pytest.raises(BundleError, match=r"broken/score\.onnx"),
    ):
        model.logits(IDS)
    assert not stored(cache)


def _truncate(path: Path) -> None:
    size = path.stat().st_size
    path.unlink()  # the file may be shared with other graphs, or mapped
    path.write_bytes(bytes(size // 2))


def _truncate_shared(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def _flip_some(path: Path, start: int) -> None:
    data = bytearray(path.read_bytes())
    data[start : start + 64] = bytes(byte ^ 0x55 for byte in data[start : start + 64])
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("prepacked.bin", _truncate),
        ("prepacked.bin", _truncate_shared),
        ("prepacked.bin", Path.unlink),
        ("score.onnx", _truncate),
        ("score.onnx", _flip),
        ("score.onnx", Path.unlink),
        ("files.json", _truncate),
        ("files.json", Path.unlink),
        ("files.json", lambda path: path.write_text("[1]")),
        ("files.json", lambda path: path.write_text("{}")),
    ],
)
def test_damaged_files_are_built_again(
    name: str, damage: Any, bundle: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answers(bundle)
    damage(key_folder(cache) / "score" / name)
    with caplog.at_level(logging.WARNING, "neo_runtime"):
        found = answers(bundle)
    assert np.array_equal(found, expected)
    assert "is damaged; building the prepacked weights again" in caplog.records[0].getMessage()
    repaired = inodes(cache)
    assert np.array_equal(answers(bundle), expected)
    assert inodes(cache) == repaired
    weights = [s for path, s in stored(cache).items() if path.endswith("prepacked.bin")]
    assert {s.st_size for s in weights} == {weights[0].st_size}
    assert not list(key_folder(cache).glob(".partial-*"))


def test_verify_finds_weights_that_were_changed(
    bundle: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sizes do not tell, and reading all of them at each load would undo the mapping."""
    expected = answers(bundle)
    weights = key_folder(cache) / "score" / "prepacked.bin"
    kept = weights.read_bytes()
    _flip_some(weights, len(kept) // 16)
    with caplog.at_level(logging.WARNING, "neo_runtime"):
        assert not np.array_equal(answers(bundle), expected)
    assert not caplog.records, "it is not found otherwise: onnxruntime compares a part alone"
    with caplog.at_level(logging.WARNING, "neo_runtime"):
        assert np.array_equal(answers(bundle, verify=True), expected)
    assert "is damaged; building the prepacked weights again" in caplog.text
    assert weights.read_bytes() == kept
    caplog.clear()
    assert np.array_equal(answers(bundle), expected)
    assert np.array_equal(answers(bundle, verify=True), expected)
    assert not caplog.records


def test_what_cannot_be_loaded_is_built_again(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answers(bundle)
    before = inodes(cache)
    open_session = sessions.SessionFactory._open
    refused: list[Path] = []

    def open_or_refuse(factory: Any, path: Path, options: Any) -> Any:
        if path.is_relative_to(cache) and path.name == "score.onnx" and not refused:
            refused.append(path)
            raise BundleError("an offset behind the end")
        return open_session(factory, path, options)

    monkeypatch.setattr(sessions.SessionFactory, "_open", open_or_refuse)
    with caplog.at_level(logging.WARNING, "neo_runtime"):
        assert np.array_equal(answers(bundle), expected)
    assert refused
    assert "is damaged; building the prepacked weights again" in caplog.text
    assert inodes(cache) != before


def test_left_overs_of_a_killed_build_go(bundle: Path, cache: Path) -> None:
    answers(bundle)
    folder = key_folder(cache)
    (folder / "score").rename(folder / ".partial-killed")
    answers(bundle)
    assert {path.name for path in folder.iterdir()} == {*GRAPHS, "lock"}


TWO_AT_ONCE = """
import sys
import neo_runtime
with neo_runtime.load(sys.argv[1], threads=1) as model:
    sys.stdin.readline()
    print(model.logits(range(7, 31)).argmax(axis=1).tolist())
    print(model.prefill(model.new_cache(1, 32), [range(7, 31)]).argmax())
"""


def test_two_processes_build_at_once(bundle: Path, cache: Path) -> None:
    expected = answers(bundle, keep_prepacked=False)[: len(IDS) + 1].argmax(axis=1).tolist()
    processes = [_start(TWO_AT_ONCE, str(bundle)) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        assert out.splitlines() == [str(expected[:-1]), str(expected[-1])]
        assert error == ""
    names = {path.name for path in key_folder(cache).iterdir()}
    assert names == {"score", "prefill", "lock"}
    before = inodes(cache)
    answers(bundle)
    assert before.items() <= inodes(cache).items()


def _start(program: str, *arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


def _python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


def test_key_says_what_the_files_depend_on(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = Manifest.from_json((bundle / "neo.json").read_text()).digest
    keys = {
        PrepackedCache(digest, "1.32.0", tmp_path).folder,
        PrepackedCache(digest, "1.32.1", tmp_path).folder,
        PrepackedCache(digest[::-1], "1.32.0", tmp_path).folder,
    }
    kind = prepacked.cpu_kind()
    monkeypatch.setattr(prepacked, "cpu_kind", lambda: f"{kind} avx10")
    keys.add(PrepackedCache(digest, "1.32.0", tmp_path).folder)
    monkeypatch.setattr(prepacked, "_LAYOUT", "0")
    keys.add(PrepackedCache(digest, "1.32.0", tmp_path).folder)
    assert len(keys) == 5
    monkeypatch.undo()
    again = PrepackedCache(digest, "1.32.0", tmp_path).folder
    assert again in keys
    assert again.parent == tmp_path / "prepacked"


def test_bundles_do_not_share(bundle: Path, cache: Path, tmp_path: Path) -> None:
    """A copy of a bundle is the same bundle, another export is not."""
    shutil.copytree(bundle, tmp_path / "copy")
    answers(bundle)
    before = inodes(cache)
    answers(tmp_path / "copy")
    assert inodes(cache) == before
    make_checkpoint(tmp_path / "checkpoint", CONFIG, seed=1)
    export_bundle(str(tmp_path / "checkpoint"), tmp_path / "other", ExportOptions(precision="int8"))
    found = answers(tmp_path / "other")
    assert len(list((cache / "prepacked").iterdir())) == 2
    assert np.array_equal(found, answers(tmp_path / "other", keep_prepacked=False))


def test_a_user_without_a_home_has_no_cache(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A container may run as anybody."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("NEO_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with caplog.at_level(logging.WARNING, "neo_runtime"):
        assert answers(bundle).size
    assert [record.getMessage().count("no home folder") for record in caplog.records] == [1]


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root() != Path.home() / ".cache" / "neo-onnx", "the session's own, see conftest"
    monkeypatch.setenv("NEO_CACHE_DIR", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("NEO_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "neo-onnx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "neo-onnx"


def in_a_shared_place(cache: Path) -> tuple[Path, Path]:
    """The bundle's folder of a cache that lies where everybody may write, and somebody's file."""
    cache.parent.chmod(0o1777)
    precious = cache.parent / "precious"
    precious.write_text("kept")
    return key_folder(cache), precious


def give_away(patch: pytest.MonkeyPatch, *paths: Path) -> None:
    """Let files belong to another user than the one that runs."""
    if os.geteuid() == 0:
        for path in paths:
            os.chown(path, 65534, -1)
    else:
        patch.setattr(os, "geteuid", lambda: 65534)


def test_folders_of_other_users_are_not_used(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a shared place they could be there first, with other weights or a link as the lock."""
    answers(bundle)
    folder, precious = in_a_shared_place(cache)
    for path in (folder, folder.parent):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "lock").symlink_to(precious)
        with monkeypatch.context() as patch:
            give_away(patch, path)
            caplog.clear()
            answers(bundle)
        assert "belongs to user" in caplog.text
        assert [entry.name for entry in folder.iterdir()] == ["lock"]
        assert precious.read_text() == "kept"
        if os.geteuid() == 0:
            os.chown(path, 0, -1)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="about users")
def test_a_folder_that_another_user_makes_meanwhile(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind the look at what is there, and before ours."""
    answers(bundle)
    folder, precious = in_a_shared_place(cache)
    shutil.rmtree(folder)
    make = Path.mkdir

    def quicker(path: Path, *arguments: Any, **options: Any) -> None:
        make(path, *arguments, **options)
        if path == folder:
            (folder / "lock").symlink_to(precious)
            give_away(monkeypatch, folder)

    monkeypatch.setattr(Path, "mkdir", quicker)
    answers(bundle)
    assert "belongs to user" in caplog.text
    assert precious.read_text() == "kept"
    assert [entry.name for entry in folder.iterdir()] == ["lock"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="about users")
def test_the_owner_of_the_cache_is_trusted(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where not everybody could have made it: file systems that give all files one owner."""
    answers(bundle)
    stored = sorted(cache.rglob("*"))
    give_away(monkeypatch, cache, *stored)
    cache.parent.chmod(0o755)
    answers(bundle)
    assert not caplog.text
    cache.parent.chmod(0o1777)
    answers(bundle)
    assert "belongs to user" in caplog.text
