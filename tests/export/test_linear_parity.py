"""int8, int4 and fp8 of the target tensorrt against PyTorch on the weights as they are stored.

Activations are float16, so the limit is float16's: what a weight lost is not counted, and nothing
else may be. onnxruntime's own rewrites are off, since they would round activations to int8.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from helpers.models import ODD_CONFIGS, Reference, make_checkpoint, random_ids
from helpers.running import Graphs, assert_agrees, relative_l2
from neo_export.decisions import calibrated as calibrated_module
from neo_export.decisions.calibrated import Calibrated
from neo_export.decisions.half_range import HalfRange, WideTensor
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.quantize.linear import LEVELS, quantize_linear
from neo_export.quantize.migration import Migration
from neo_export.quantize.plan import WeightPlan
from neo_export.targets import TARGETS, Quantization
from neo_export.tolerances import TOLERANCES
from neo_runtime.errors import RequestError, StatisticsError
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

LIMIT = TOLERANCES["fp16"].logits
BLOCK = 16
TARGET = TARGETS["tensorrt"]
KINDS = ("int8", "int4", "fp8")
NAMES = ("plain", "untied_head", "head_size_80", "all_local")
LARGEST = 1.5
"""Inputs beyond are clipped: below the largest that occur, so that the clip is in the test."""


def stored_checkpoint(source: Path, folder: Path, kind: str) -> Path:
    """The checkpoint with every projection as `kind` has it."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and ".h." in name:
            block = BLOCK if kind == "int4" else None
            tensors[name] = quantize_linear(tensor, kind, block).read_back()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@dataclass(frozen=True)
class Case:
    source: Path
    graphs: Graphs
    reference: Reference
    ids: NDArray[np.int64]
    logits: NDArray[np.float32]


def export(source: Path, folder: Path, kind: str) -> Graphs:
    quantization = Quantization(block_size=BLOCK if kind == "int4" else None)
    options = ExportOptions(target="tensorrt", precision=kind, quantization=quantization)
    export_bundle(str(source), folder, options)
    return Graphs(folder, optimize=False)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    @functools.cache
    def case(name: str, kind: str) -> Case:
        folder, config = tmp_path_factory.mktemp(f"{name}-{kind}"), ODD_CONFIGS[name]
        source = make_checkpoint(folder / "checkpoint", config)
        reference = Reference(stored_checkpoint(source, folder / "stored", kind))
        ids = random_ids(config, 1, config.max_position_embeddings)
        graphs = export(source, folder / "bundle", kind)
        return Case(source, graphs, reference, ids, reference.logits(ids))

    return case


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_position(make: Callable[[str, str], Case], name: str, kind: str) -> None:
    """Scoring, a chunked prompt across the window, then single tokens to the last position."""
    case = make(name, kind)
    assert_agrees(case.graphs.run("score", case.ids), case.logits, LIMIT)
    cache = case.graphs.cache()
    for start, end in ((0, 5), (5, 9), (9, 20)):
        found = case.graphs.run("prefill", case.ids[:, start:end], cache)
        assert_agrees(found, case.logits[:, end - 1 : end], LIMIT)
    found = [case.graphs.run("decode", case.ids[:, n : n + 1], cache) for n in range(20, 40)]
    assert_agrees(np.concatenate(found, axis=1), case.logits[:, 20:], LIMIT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_would_show_other_weights(make: Callable[[str, str], Case], kind: str) -> None:
    """The weights' rounding, which the reference shares, is many times the limit."""
    case = make("plain", kind)
    original = Reference(case.source).logits(case.ids)
    assert relative_l2(case.logits, original).max() > 2 * LIMIT


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_is_stored_once(make: Callable[[str, str], Case], kind: str) -> None:
    """Beside the projections: one float16 table, positions, biases and norms."""
    case = make("plain", kind)
    tensors = load_file(case.source / "model.safetensors")
    projections = sum(t.size for n, t in tensors.items() if t.ndim == 2 and ".h." in n)
    others = 2 * sum(t.size for t in tensors.values()) - 2 * projections
    narrow = projections // 2 if kind == "int4" else projections
    rows = {n: t.shape for n, t in tensors.items() if t.ndim == 2 and ".h." in n}
    scales = sum(2 * (a * b // BLOCK if kind == "int4" else a) for a, b in rows.values())
    size = (case.graphs.bundle / "weights.bin").stat().st_size
    exact = narrow + scales + others
    padding = 4096 * len(tensors)
    assert exact <= size <= exact + padding


def fake_quantize(reference: Reference, kind: str) -> None:
    """Round what every projection of PyTorch's model reads, as the graph does."""
    import torch

    step = np.float32(np.float16(LARGEST / LEVELS[kind]))

    def rounded(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0].numpy() / step
        if kind == "int8":
            x = np.clip(np.rint(x), -128, 127)
        else:
            limited = np.clip(x, -448, 448)
            x = limited.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return (torch.from_numpy(np.asarray(x * step, dtype=np.float32)),)

    for name, module in reference.model.transformer.h.named_modules():
        if name.endswith(("_proj", "c_fc")):
            module.register_forward_pre_hook(rounded)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantized_inputs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch that rounds its projections' inputs the same way, by code of its own."""
    monkeypatch.setattr(Calibrated, "largest_input", lambda _self, _weight: LARGEST)
    config = ODD_CONFIGS["plain"]
    source = make_checkpoint(tmp_path / "checkpoint", config)
    graphs = export(source, tmp_path / "bundle", kind)
    reference = Reference(stored_checkpoint(source, tmp_path / "stored", kind))
    ids = random_ids(config, 1, config.max_position_embeddings)
    exact = reference.logits(ids)
    fake_quantize(reference, kind)
    expected = reference.logits(ids)
    error = relative_l2(graphs.run("score", ids), expected)[0]
    # A value on the edge between two levels falls to either side by float16's rounding.
    assert np.median(error) <= 2e-2
    assert np.median(error) < np.median(relative_l2(exact, expected)) / 3
    cache = graphs.cache()
    graphs.run("prefill", ids[:, :30], cache)
    found = [graphs.run("decode", ids[:, n : n + 1], cache) for n in range(30, 40)]
    assert np.median(relative_l2(np.concatenate(found, axis=1), expected[:, 30:])) <= 2e-2


def test_the_range_of_an_input_follows_the_outliers_that_were_moved() -> None:
    class Ranges:
        """Statistics of three channels."""

        def channel_range(self, place: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            assert place == "transformer.h.1.ln_2"
            return np.float32([-1.0, 90.0, -2.0]), np.float32([3.0, 110.0, 1.0])

    weight = "transformer.h.1.mlp.c_fc.weight"
    statistics: Any = Ranges()
    assert Calibrated(statistics=statistics).largest_input(weight) == 110.0
    place = "transformer.h.1.ln_2"
    migration = Migration(
        scales={place: np.float32([1.0, 2.0, 0.5])}, shifts={place: np.float32([0.0, 100.0, 0.0])}
    )
    assert Calibrated(migration, statistics=statistics).largest_input(weight) == 5.0
    assert Calibrated().largest_input(weight) is None


@pytest.mark.parametrize("kind", KINDS)
def test_activations_beyond_float16_are_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between quantized products it is float16 that computes."""
    too_large = WideTensor("transformer.h.0.residual", "reaches 1e+05 on the calibration's text")
    found = HalfRange(tensors=(too_large,))
    monkeypatch.setattr(calibrated_module, "find_half_range", lambda *_: found)
    checkpoint: Any = SimpleNamespace(tensors={}, spec=None)
    nothing: Any = None
    plan = WeightPlan.uniform(kind, BLOCK if kind == "int4" else None)
    with pytest.raises(StatisticsError, match=r"h\.0\.residual reaches.*tensorrt.*--fp16"):
        calibrated_module.calibrated(
            SimpleNamespace(), checkpoint, nothing, TARGET, kind, plan, nothing
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_too_small_for_scales_in_float16_is_refused(kind: str, tmp_path: Path) -> None:
    """It would be stored as zeros, whatever a norm before it makes up for."""
    source = make_checkpoint(tmp_path / "checkpoint", ODD_CONFIGS["plain"])
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"] *= np.float32(2.0**-24)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match=r"h\.1\.mlp\.c_fc\.weight cannot be stored in " + kind):
        export(source, tmp_path / "bundle", kind)
    assert not (tmp_path / "bundle").exists()
