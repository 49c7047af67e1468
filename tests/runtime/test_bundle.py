"""Opening a bundle: whole ones open, and every kind of damage has its own error."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from helpers.bundles import (
    GRAPHS,
    edit_json,
    external_tensor,
    graph_bytes,
    graph_spec,
    make_bundle,
    model_spec,
    rewrite_manifest,
)
from neo_runtime.bundle import folder as bundle_module
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.bundle.manifest import CacheSpec, FileRecord, TensorSpec
from neo_runtime.errors import BundleDamagedError, BundleError, BundleUnsupportedError, RequestError

SMALL_FILES = ("prefill.onnx", "decode.onnx", "score.onnx", "config.json", "tokenizer.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def pretend_onnxruntime(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    module = SimpleNamespace(__version__=version)
    monkeypatch.setattr(bundle_module, "require_onnxruntime", lambda: module)


@pytest.mark.parametrize("verify", [False, True])
def test_a_whole_bundle_opens(folder: Path, verify: bool) -> None:
    bundle = open_bundle(str(folder), verify=verify)
    assert bundle.path == folder
    assert bundle.manifest.model == model_spec()
    assert bundle.file("engines/old.plan").read_text() == "none\n"
    with pytest.raises(BundleError, match=r"has no file 'nothing'; it has config\.json, decode"):
        bundle.file("nothing")


@pytest.mark.parametrize("name", ["prefill.onnx", "weights.bin", "tokenizer.json"])
def test_what_changes_behind_an_open_bundle_is_found(folder: Path, name: str) -> None:
    bundle = open_bundle(folder)
    data = (folder / name).read_bytes()
    os.utime(folder / name, (1, 1))
    assert bundle.file(name).read_bytes() == data, "the same contents, however old"
    (folder / "copy").write_bytes(data)
    (folder / "copy").replace(folder / name)
    assert bundle.graph("prefill") == folder / "prefill.onnx"
    (folder / name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
    os.utime(folder / name, (2, 2))
    with pytest.raises(BundleDamagedError, match=rf"{name} has changed since .*load again"):
        bundle.file(name)
    if name != "tokenizer.json":
        with pytest.raises(BundleDamagedError, match=name):
            bundle.graph("prefill")
    (folder / name).write_bytes(data + b"of another size")
    with pytest.raises(BundleDamagedError, match=rf"{name} has changed since .*load again"):
        bundle.file(name)
    (folder / name).unlink()
    with pytest.raises(BundleDamagedError, match=rf"{name} is missing"):
        bundle.file(name)


def test_a_bundle_that_is_replaced_while_it_is_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bundle(folder.parent / "other", weights=bytes(range(1, 65)))
    check = bundle_module._check_place_and_size

    def exchanged(place: Path, name: str, record: FileRecord) -> tuple[int, ...]:
        if (folder.parent / "other").exists():
            folder.rename(folder.parent / "old")
            (folder.parent / "other").rename(folder)
        return check(place, name, record)

    monkeypatch.setattr(bundle_module, "_check_place_and_size", exchanged)
    with pytest.raises(BundleDamagedError, match="was replaced while it was opened"):
        open_bundle(folder)


def test_a_link_may_be_turned_to_another_bundle(folder: Path) -> None:
    (folder.parent / "current").symlink_to(folder)
    bundle = open_bundle(folder.parent / "current")
    (folder.parent / "current").unlink()
    (folder.parent / "current").symlink_to(folder.parent)
    assert bundle.graph("prefill") == folder / "prefill.onnx"


def test_the_working_folder_may_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    bundle = open_bundle(folder.name)
    monkeypatch.chdir("/")
    assert bundle.file("engines/old.plan").read_text() == "none\n"
    with pytest.raises(RequestError, match="the bundle is None, expected the path of a folder"):
        open_bundle(None)  # type: ignore[arg-type]


def test_the_graphs_are_valid_for_onnx_itself(folder: Path) -> None:
    for name in GRAPHS:
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        assert model.graph.initializer[0].external_data[0].value == "weights.bin"


def test_progress_counts_every_byte(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    open_bundle(folder, verify=True, progress=lambda done, total: seen.append((done, total)))
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != "neo.json")
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("name", [*SMALL_FILES, "engines/old.plan"])
def test_a_flipped_bit_is_found(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleDamagedError, match=rf"{name} does not match its checksum: sha256 "):
        open_bundle(folder)


def test_a_flipped_bit_in_the_weights_is_found_on_request(folder: Path) -> None:
    data = bytearray((folder / "weights.bin").read_bytes())
    data[-1] ^= 0x80
    (folder / "weights.bin").write_bytes(data)
    open_bundle(folder)
    with pytest.raises(BundleDamagedError, match=r"weights\.bin does not match its checksum"):
        open_bundle(folder, verify=True)


@pytest.mark.parametrize("name", [*SMALL_FILES, "weights.bin"])
@pytest.mark.parametrize("change", [-1, 1])
def test_another_size_is_found(folder: Path, name: str, change: int) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] if change < 0 else data + b"\0")
    expected = rf"{name} has {len(data) + change} bytes, expected {len(data)}; copy or export"
    with pytest.raises(BundleDamagedError, match=expected):
        open_bundle(folder)


@pytest.mark.parametrize("name", [*SMALL_FILES, "weights.bin"])
def test_a_missing_file_is_found(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleDamagedError, match=rf"{name} is missing; copy or export"):
        open_bundle(folder)


def test_a_folder_in_a_files_place(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(BundleDamagedError, match=r"config\.json is not a regular file"):
        open_bundle(folder)


def test_a_manifest_that_never_ends_is_not_read(folder: Path) -> None:
    manifest = folder / "neo.json"
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(BundleError, match=r"neo\.json cannot be read: it is no file"):
        open_bundle(folder)
    manifest.unlink()
    manifest.symlink_to("/dev/zero")
    with pytest.raises(BundleError, match=r"neo\.json cannot be read: it is no file"):
        open_bundle(folder)
    manifest.unlink()
    with manifest.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleError, match="1099511627776 bytes, expected at most"):
        open_bundle(folder)


def test_half_a_character_in_the_manifest(folder: Path) -> None:
    raw = json.loads((folder / "neo.json").read_text())
    raw["tools"]["\ud800"] = "1"
    (folder / "neo.json").write_text(json.dumps(raw))
    with pytest.raises(BundleDamagedError, match="contains an unpaired surrogate"):
        open_bundle(folder)


@pytest.mark.parametrize("name", ["weights.bin", "neo.json", "prefill.onnx"])
def test_a_file_that_may_not_be_read(name: str) -> None:
    """As `nobody` when the tests run as root, whom no permission stops."""
    place = Path(tempfile.mkdtemp())
    user = os.geteuid()
    try:
        place.chmod(0o755)
        make_bundle(place / "bundle")
        (place / "bundle" / name).chmod(0)
        os.seteuid(65534 if user == 0 else user)
        expected = rf"/{re.escape(name)} cannot be read: Permission denied; give this user read"
        with pytest.raises(BundleError, match=expected):
            open_bundle(place / "bundle")
    finally:
        os.seteuid(user)
        shutil.rmtree(place)


def test_a_pipe_in_a_files_place_does_not_block(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(BundleDamagedError, match=r"config\.json is not a regular file"):
        open_bundle(folder)


class TestNotABundle:
    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match=r"nowhere does not exist; expected a folder written"):
            open_bundle(tmp_path / "nowhere")

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(b"")
        with pytest.raises(BundleError, match=r"model\.onnx is not a folder"):
            open_bundle(tmp_path / "model.onnx")

    def test_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(b"")
        with pytest.raises(BundleError, match=r"cannot be opened: Not a directory"):
            open_bundle(tmp_path / "model.onnx" / "x")

    def test_no_manifest(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match=r"has no neo\.json; expected a folder written by"):
            open_bundle(tmp_path)

    def test_the_manifest_is_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "neo.json").mkdir()
        with pytest.raises(BundleError, match=r"neo\.json cannot be read: Is a directory"):
            open_bundle(tmp_path)

    def test_a_null_byte(self) -> None:
        with pytest.raises(BundleError, match=r"is not a path"):
            open_bundle("a\0b")


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "engines/../../outside",
        "/etc/hostname",
        "engines//old.plan",
        "./config.json",
        "engines/",
        "",
        ".",
        "..\\outside",
        "C:outside",
        "a\0b",
        "a\nb",
        "*/_ORT_MEM_ADDR_/*",
    ],
)
def test_a_name_that_is_no_plain_path(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_bytes(b"")
    empty = {
        "size": 0,
        "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
    edit_json(folder, "files", name, value=empty)
    with pytest.raises(BundleDamagedError, match=r"not a plain path inside the folder"):
        open_bundle(folder)


class TestLinks:
    def test_that_leave_the_folder(self, folder: Path) -> None:
        (folder / "weights.bin").rename(folder.parent / "weights.bin")
        (folder / "weights.bin").symlink_to("../weights.bin")
        with pytest.raises(BundleDamagedError, match=r"weights\.bin is a symlink to"):
            open_bundle(folder)

    def test_that_leave_it_through_a_folder(self, folder: Path) -> None:
        (folder / "engines").rename(folder.parent / "engines")
        (folder / "engines").symlink_to(folder.parent / "engines")
        with pytest.raises(BundleDamagedError, match=r"old\.plan is a symlink to"):
            open_bundle(folder)

    def test_that_leave_it_to_a_folder_with_a_longer_name(self, folder: Path) -> None:
        outside = folder.with_name(folder.name + "-2")
        outside.mkdir()
        (folder / "config.json").rename(outside / "config.json")
        (folder / "config.json").symlink_to(outside / "config.json")
        with pytest.raises(BundleDamagedError, match=r"config\.json is a symlink to"):
            open_bundle(folder)

    def test_to_nothing_and_in_a_circle(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to("absent")
        with pytest.raises(BundleError, match=r"config\.json cannot be opened"):
            open_bundle(folder)
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to("config.json")
        with pytest.raises(BundleError, match=r"config\.json cannot be opened"):
            open_bundle(folder)

    def test_that_stay_inside_and_one_to_the_bundle_are_fine(self, folder: Path) -> None:
        (folder / "config.json").rename(folder / "engines" / "config.json")
        (folder / "config.json").symlink_to("engines/config.json")
        (folder.parent / "current").symlink_to("bundle")
        assert open_bundle(folder.parent / "current").file("config.json").is_file()


class TestExternalData:
    @pytest.mark.parametrize(
        "location",
        ["../secret", "/etc/hostname", "./weights.bin", "absent.bin", "*/_ORT_MEM_ADDR_/*"],
    )
    def test_that_is_no_file_of_the_bundle(self, folder: Path, location: str) -> None:
        (folder / "decode.onnx").write_bytes(graph_bytes("decode", external_tensor("w", location)))
        rewrite_manifest(folder)
        with pytest.raises(BundleDamagedError, match=r"decode\.onnx reads tensors from '.*not a f"):
            open_bundle(folder)

    def test_in_another_file_of_the_bundle(self, folder: Path) -> None:
        (folder / "more.bin").write_bytes(bytes(16))
        (folder / "score.onnx").write_bytes(graph_bytes("score", external_tensor("w", "more.bin")))
        rewrite_manifest(folder)
        open_bundle(folder)

    def test_a_graph_that_is_no_protobuf(self, folder: Path) -> None:
        (folder / "score.onnx").write_bytes(b"\x7fELF not a graph")
        rewrite_manifest(folder)
        with pytest.raises(BundleDamagedError, match=r"score\.onnx is not an ONNX model"):
            open_bundle(folder)


class TestUnsupported:
    def test_a_newer_schema(self, folder: Path) -> None:
        edit_json(folder, "schema_version", value=2)
        with pytest.raises(BundleUnsupportedError, match=r"schema version 2.*reads up to 1"):
            open_bundle(folder)

    @pytest.mark.parametrize(("key", "known"), [("target", "portable"), ("precision", "fp16")])
    def test_an_unknown_target_or_precision(self, folder: Path, key: str, known: str) -> None:
        edit_json(folder, key, value="abacus")
        with pytest.raises(BundleUnsupportedError, match=rf"{key} is 'abacus', but.*{known}"):
            open_bundle(folder)

    @pytest.mark.parametrize(
        ("installed", "needed"),
        [("1.9.0", "1.17.0"), ("1.22.1", "1.23"), ("1.22.9.dev1", "1.23.0"), ("0.99", "1")],
    )
    def test_too_old_an_onnxruntime(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, installed: str, needed: str
    ) -> None:
        pretend_onnxruntime(monkeypatch, installed)
        rewrite_manifest(folder, minimum_onnxruntime=needed)
        expected = rf"needs onnxruntime {needed} or newer, but {installed} is installed"
        with pytest.raises(BundleUnsupportedError, match=expected):
            open_bundle(folder)
        open_bundle(folder, check_runtime=False)

    @pytest.mark.parametrize(
        ("installed", "needed"),
        [("1.23", "1.23.0"), ("1.100.0", "1.23.0"), ("1.24.0rc1", "1.23"), ("2.0+cu130", "1.23.4")],
    )
    def test_an_onnxruntime_new_enough(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, installed: str, needed: str
    ) -> None:
        pretend_onnxruntime(monkeypatch, installed)
        rewrite_manifest(folder, minimum_onnxruntime=needed)
        open_bundle(folder)


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"max_length": 17}, "max_length is 17, expected 1 to max_position_embeddings, 16"),
    ({"max_length": 0}, "max_length is 0"),
    ({"minimum_onnxruntime": "new"}, "minimum_onnxruntime: 'new' is not a version"),
    ({"graphs": {n: graph_spec(n) for n in GRAPHS[:2]}}, "'score' is missing; found decode, pref"),
    ({"graphs": {}}, "graph 'prefill' is missing; found none"),
    (
        {"graphs": {n: dataclasses.replace(graph_spec(n), file="else.onnx") for n in GRAPHS}},
        "file of graph 'decode', 'else.onnx', is not in files",
    ),
    (
        {"cache": CacheSpec(layout="in_place", padding="right", dtype="float16")},
        "input 'past_key_values.0.key' of graph 'decode' is float32, expected float16",
    ),
    (
        {"cache": CacheSpec(layout="in_place", padding="right", dtype="int3")},
        "cache.dtype is 'int3'",
    ),
    (
        {"cache": CacheSpec(layout="in_place", padding="right", dtype="float32", window=0)},
        "cache.window is 0",
    ),
    ({"files": {}}, "files has no entry for weights.bin"),
    ({"files": {"weights.bin": FileRecord(size=-1, sha256="0" * 64)}}, "has size -1 and sha256"),
    ({"files": {"weights.bin": FileRecord(size=1, sha256="0x")}}, "sha256 '0x', expected"),
    (
        {"files": {n: FileRecord(size=1, sha256="0" * 64) for n in ("weights.bin", "neo.json")}},
        "lists neo.json, which cannot contain its own checksum",
    ),
    *(
        ({"model": dataclasses.replace(model_spec(), **changes)}, message)
        for changes, message in (
            ({"attention_layers": ("global",)}, "has 1 entries, expected model.num_layers, 2"),
            ({"attention_layers": ("global", "sideways")}, "has 'sideways'"),
            ({"num_layers": 3}, "has 2 entries, expected model.num_layers, 3"),
            ({"num_heads": 4}, "is 4 × 4, expected model.hidden_size, 8"),
            ({"num_heads": 4, "head_dim": 2}, "expected 4 at dimension 1"),
            ({"window_size": 0}, "model.window_size is 0"),
            ({"layer_norm_epsilon": float("nan")}, "model.layer_norm_epsilon is nan"),
            ({"vocab_size": 12}, "'logits' of graph 'decode' has shape .* expected 12 at dimens"),
        )
    ),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS, ids=[m for _, m in CONTRADICTIONS])
def test_a_manifest_that_contradicts_itself(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    rewrite_manifest(folder, **changes)
    with pytest.raises(BundleDamagedError, match=rf"neo\.json: .*{message}.*; export the bundle"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("side", "name"),
    [
        ("inputs", "input_ids"),
        ("inputs", "attention_mask"),
        ("inputs", "position_ids"),
        ("inputs", "past_key_values.1.value"),
        ("outputs", "logits"),
        ("outputs", "present.0.key"),
    ],
)
@pytest.mark.parametrize("graph", GRAPHS)
def test_every_input_and_output_of_the_contract_is_needed(
    folder: Path, graph: str, side: str, name: str
) -> None:
    spec = graph_spec(graph)
    left = tuple(t for t in getattr(spec, side) if t.name != name)
    graphs = {n: graph_spec(n) for n in GRAPHS}
    rewrite_manifest(folder, graphs=graphs | {graph: dataclasses.replace(spec, **{side: left})})
    with pytest.raises(BundleDamagedError, match=rf"graph '{graph}' has no {side[:-1]} '{name}'"):
        open_bundle(folder)


def test_inputs_of_another_type_or_rank(folder: Path) -> None:
    spec = graph_spec("decode")
    for tensor, message in (
        (TensorSpec(name="input_ids", dtype="int32", shape=("b", 1)), "is int32, expected int64"),
        (TensorSpec(name="input_ids", dtype="int64", shape=("b",)), "expected 2 dimensions"),
    ):
        graphs = {n: graph_spec(n) for n in GRAPHS}
        graphs["decode"] = dataclasses.replace(spec, inputs=(tensor, *spec.inputs[1:]))
        rewrite_manifest(folder, graphs=graphs)
        with pytest.raises(BundleDamagedError, match=rf"'input_ids' of graph 'decode' .*{message}"):
            open_bundle(folder)


def test_further_inputs_graphs_and_files_are_welcome(folder: Path) -> None:
    (folder / "README.md").write_text("unlisted\n")
    graphs = {n: graph_spec(n) for n in GRAPHS} | {"extra": graph_spec("score")}
    more = TensorSpec(name="total_sequence_length", dtype="int32", shape=(1,))
    graphs["decode"] = dataclasses.replace(
        graphs["decode"], inputs=(*graphs["decode"].inputs, more)
    )
    rewrite_manifest(folder, graphs=graphs)
    open_bundle(folder, verify=True)
