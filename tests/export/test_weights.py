"""`weights.bin`: one file under three graphs, each tensor once, its bytes the checkpoint's."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from helpers.models import TinyConfig, make_checkpoint
from neo_export.bundle import weights
from neo_export.exporter import ExportOptions, export_bundle
from neo_runtime.bundle.manifest import Manifest
from neo_runtime.errors import CheckpointError
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

GRAPHS = ("prefill", "decode", "score")
TARGETS = ("cpu", "portable")
TABLE = "transformer.wte.weight"
CONFIG = TinyConfig(vocab_size=200)
"""Its tables and most of its matrices are larger than a page, its vectors smaller."""

Place = tuple[int, int]


@dataclass(frozen=True)
class Export:
    """A checkpoint, and the bundles made of it."""

    config: TinyConfig
    checkpoint: Path
    tensors: dict[str, NDArray[np.float32]]

    def bundle(self, target: str) -> Path:
        folder = self.checkpoint.parent / target
        if not folder.exists():
            export_bundle(str(self.checkpoint), folder, ExportOptions(target=target))
        return folder


@pytest.fixture(scope="module", params=["tied", "untied"])
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    config = TinyConfig(vocab_size=200, tie_word_embeddings=request.param == "tied")
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("weights") / "checkpoint", config)
    return Export(config, checkpoint, load_file(checkpoint / "model.safetensors"))


def external(path: Path) -> dict[str, Place]:
    """Name → (offset, length) of every tensor that a graph keeps in the weight file."""
    places = {}
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == "weights.bin"
            places[tensor.name] = (int(entries["offset"]), int(entries["length"]))
        else:  # constants that the graph itself brings
            assert len(tensor.SerializeToString()) < 128, tensor.name
    return places


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its relative path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def bytes_at(bundle: Path, place: Place) -> bytes:
    data = (bundle / "weights.bin").read_bytes()
    return data[place[0] : sum(place)]


@pytest.mark.parametrize("target", TARGETS)
def test_graphs_share_one_file(export: Export, target: str) -> None:
    bundle = export.bundle(target)
    of_graphs = [external(bundle / f"{name}.onnx") for name in GRAPHS]
    assert of_graphs[0] == of_graphs[1] == of_graphs[2]
    for name in GRAPHS:
        assert (bundle / f"{name}.onnx").stat().st_size < 1_000_000
    assert [path.name for path in bundle.glob("*.bin")] == ["weights.bin"]


@pytest.mark.parametrize("target", TARGETS)
def test_places_do_not_overlap_and_begin_on_pages(export: Export, target: str) -> None:
    bundle = export.bundle(target)
    places = sorted(external(bundle / "score.onnx").values())
    end = 0
    for offset, length in places:
        assert offset >= end
        assert offset - end < 4096, "no gap of more than a page"
        assert offset % (4096 if length >= 4096 else 64) == 0
        end = offset + length
    assert end == (bundle / "weights.bin").stat().st_size
    assert any(length >= 4096 for _, length in places)
    assert any(length < 4096 for _, length in places)


@pytest.mark.parametrize("target", TARGETS)
def test_every_tensor_is_there_once(export: Export, target: str) -> None:
    """As many numbers as the checkpoint has, so nothing twice: not the tied table either."""
    bundle = export.bundle(target)
    places = external(bundle / "score.onnx")
    stored = sum(length for _, length in places.values())
    assert stored == sum(tensor.nbytes for tensor in export.tensors.values())
    assert len(set(places.values())) == len(places)


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_are_those_of_the_checkpoint(export: Export, target: str) -> None:
    bundle = export.bundle(target)
    places = external(bundle / "score.onnx")
    tensors = dict(export.tensors)
    expected = {}
    if target == "cpu":
        for layer in range(len(export.config.attention_layers) - 1):  # the last one's stay apart
            prefix = f"transformer.h.{layer}.attn.attention."
            parts = [tensors.pop(f"{prefix}{part}_proj.weight") for part in "qkv"]
            tensors[f"{prefix}qkv_proj.weight"] = np.concatenate(parts)
    for name, tensor in tensors.items():
        linear = ".h." in name and tensor.ndim == 2
        if linear:
            expected[f"{name}.transposed"] = tensor.T.tobytes()
        else:
            expected[name] = tensor.tobytes()
    assert {name: bytes_at(bundle, place) for name, place in places.items()} == expected


@pytest.mark.parametrize("target", TARGETS)
def test_a_tied_table_is_read_by_embedding_and_head_alike(export: Export, target: str) -> None:
    for name in GRAPHS:
        path = export.bundle(target) / f"{name}.onnx"
        graph = onnx.load(str(path), load_external_data=False).graph
        head = next(node for node in graph.node if node.op_type == "Gemm")
        readers = {node.op_type for node in graph.node if TABLE in node.input}
        if export.config.tie_word_embeddings:
            assert readers == {"Gather", "Gemm"}
        else:
            assert readers == {"Gather"}
            assert head.input[1] == "lm_head.weight"


def test_the_manifest_seals_the_file(export: Export) -> None:
    import hashlib

    bundle = export.bundle("cpu")
    record = Manifest.from_json((bundle / "neo.json").read_text()).files["weights.bin"]
    data = (bundle / "weights.bin").read_bytes()
    assert (record.size, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_large_tensors_are_written_in_pieces(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export.bundle("cpu")
    monkeypatch.setattr(weights, "_CHUNK", 1000)
    seen: list[tuple[int, int]] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "weights":
            seen.append((done, total))

    export_bundle(str(export.checkpoint), tmp_path / "pieces", progress=progress)
    assert snapshot(tmp_path / "pieces") == snapshot(whole)
    assert len(seen) > len(export.tensors)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_same_export_gives_the_same_bytes(target: str, precision: str, tmp_path: Path) -> None:
    """In two processes: with other hash seeds, sets and dictionaries come in another order."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", CONFIG)
    options = ExportOptions(target=target, precision=precision)
    export_bundle(str(checkpoint), tmp_path / "first", options)
    program = (
        "import sys, pathlib\n"
        "from neo_export.exporter import ExportOptions, export_bundle\n"
        "model, output, target, precision = sys.argv[1:]\n"
        "options = ExportOptions(target=target, precision=precision)\n"
        "export_bundle(model, pathlib.Path(output), options)\n"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    subprocess.run(
        [sys.executable, "-c", program, checkpoint, tmp_path / "second", target, precision],
        env={**os.environ, "PYTHONHASHSEED": seed},
        check=True,
    )
    first, second = snapshot(tmp_path / "first"), snapshot(tmp_path / "second")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("transformer.h.1.attn.attention.v_proj.weight", np.nan),
        ("transformer.wte.weight", np.inf),
        ("transformer.ln_f.bias", -np.inf),
    ],
)
def test_a_value_that_is_not_finite_is_an_error(
    name: str, value: float, target: str, precision: str, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", TinyConfig())
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name].reshape(-1)[7] = value
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    options = ExportOptions(target=target, precision=precision)
    with pytest.raises(CheckpointError) as caught:
        export_bundle(str(checkpoint), tmp_path / "bundle", options)
    assert name in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
