"""An int8 cache against PyTorch that attends to keys and values in int8, at every position.

PyTorch finds the ranges and does the rounding by itself. Two results of one sum differ in the last
bit, and a key on the edge between two integers then falls to either side: so nearly every position
agrees within the limit of float32, and the others within what one step makes.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.dequantized import (
    altered,
    dequantized_checkpoint,
    exact_activations,
    scaled_attention,
    window,
)
from helpers.held_out import held_out_ids
from helpers.int8_cache import cache_steps, calibrated, round_cache
from helpers.models import DEMO, ODD_CONFIGS, Reference, make_checkpoint, random_ids
from helpers.passages import passages
from helpers.running import Graphs, relative_l2
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.comparison.verify import verify_bundle
from neo_export.decisions import prepared
from neo_export.decisions.calibrated import Calibrated
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.quantize.kv_cache import steps_from_ranges
from neo_export.quantize.plan import WeightPlan
from neo_export.quantize.stored import StoredWeights
from neo_export.statistics.folder import Statistics
from neo_export.targets import Quantization
from neo_export.tolerances import TOLERANCES
from neo_runtime.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

EXACT = TOLERANCES["fp32"].logits
TINY = (
    "plain",
    "all_global",
    "all_local",
    "local_first",
    "window_1",
    "window_4",
    "window_beyond_end",
    "head_size_80",
)
CASES = ("demo-fp32", "demo-int8", "demo-int4", *(f"{name}-fp32" for name in TINY))


@dataclass(frozen=True)
class Case:
    """A bundle with an int8 cache, and what PyTorch gives."""

    bundle: Path
    exact: Path
    """The same with activations left exact, where they are rounded."""
    source: Path
    statistics: Path
    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    unrounded: NDArray[np.float32]
    """Of PyTorch with keys and values as they are."""
    window: int


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """By name: configuration and precision of the weights. Made once."""

    @functools.cache
    def make(name: str) -> Case:
        model, precision = name.split("-")
        folder = tmp_path_factory.mktemp(name)
        if model == "demo":
            source, size, text = DEMO, 64, held_out_ids(3, 512)
        else:
            config = ODD_CONFIGS[model]
            source, size = make_checkpoint(folder / "checkpoint", config), config.window_size
            text = random_ids(config, 4, config.max_position_embeddings)
        ids, text = text[:1], text[1:]
        quantization = Quantization(block_size=32) if precision == "int4" else Quantization()
        statistics = calibrated(source, text, folder / "statistics")
        options = ExportOptions(
            precision=precision,
            quantization=quantization,
            kv_cache="int8",
            calibration=statistics,
        )
        with nothing_else_calibrated():
            export_bundle(str(source), folder / "bundle", options)
        steps = cache_steps(Reference(source), text)
        exact, read_back = folder / "bundle", source
        if precision != "fp32":
            exact = altered(folder / "bundle", folder / "exact", exact_activations)
            read_back = dequantized_checkpoint(source, folder / "back", precision, quantization)
        reference = Reference(read_back)
        unrounded = reference.logits(ids)
        round_cache(reference, steps)
        logits = reference.logits(ids)
        return Case(folder / "bundle", exact, source, statistics, ids, logits, unrounded, size)

    return make


@contextmanager
def nothing_else_calibrated() -> Iterator[None]:
    """Let an export take the cache's steps from statistics and nothing else: plain rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "calibrated", lambda *_: Calibrated())
        yield


def errors(graphs: Graphs, case: Case) -> NDArray[np.float64]:
    """Relative L2 of every position of every passage."""
    every = [
        relative_l2(found, expected).ravel()
        for _, found, expected in passages(graphs, case.ids, case.logits, case.window)
    ]
    return np.concatenate(every)


@pytest.mark.parametrize("name", CASES)
def test_every_passage(name: str, cases: Callable[[str], Case]) -> None:
    """With activations left exact; onnxruntime would round them again where it may optimize."""
    case = cases(name)
    found = errors(Graphs(case.exact, optimize=case.exact == case.bundle), case)
    # int8 matrices have coarser keys, and more of them on an edge.
    assert np.median(found) <= (5 * EXACT if name == "demo-int8" else EXACT)
    assert found.max() <= TOLERANCES["int8-cache"].logits
    # The test sees the rounding itself: PyTorch without it is much further off than that.
    assert np.median(relative_l2(case.unrounded, case.logits)) > 20 * EXACT


@pytest.mark.parametrize("name", ["demo-int8", "demo-int4"])
def test_as_shipped(name: str, cases: Callable[[str], Case]) -> None:
    case, limit = cases(name), TOLERANCES[name.removeprefix("demo-")]
    found = errors(Graphs(case.bundle), case)
    assert limit.typical is not None
    assert found.max() <= limit.logits
    assert np.median(found) <= limit.typical


def test_onnxruntime_rewrites_nothing_away(cases: Callable[[str], Case]) -> None:
    """Pairs of QuantizeLinear and DequantizeLinear are what its optimizer likes to remove."""
    case = cases("demo-fp32")
    ways = [
        np.concatenate(
            [found.ravel() for _, found, _ in passages(graphs, case.ids, case.logits, case.window)]
        )
        for graphs in (Graphs(case.bundle), Graphs(case.bundle, optimize=False))
    ]
    difference = np.abs(ways[0] - ways[1])
    assert np.median(difference) <= 1e-5


def coarser_steps(model: onnx.ModelProto) -> int:
    """Three steps in one, in the cache of every layer."""
    import onnx

    [unit] = [tensor for tensor in model.graph.initializer if tensor.name == "cache.unit"]
    unit.CopyFrom(onnx.numpy_helper.from_array(np.array(3, np.float32), unit.name))
    return 1


CHANGES = {
    "window+1": window(1),
    "window-1": window(-1),
    "scaled": scaled_attention,
    "coarser": coarser_steps,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["plain-fp32", "demo-fp32"])
def test_a_wrong_graph_is_found_out(
    name: str, change: str, cases: Callable[[str], Case], tmp_path: Path
) -> None:
    case = cases(name)
    wrong = Graphs(altered(case.bundle, tmp_path / "wrong", CHANGES[change]))
    assert errors(wrong, case).max() > TOLERANCES["int8-cache"].logits


def test_every_place_of_every_layer(cases: Callable[[str], Case]) -> None:
    """By the comparison of `neo-export --verify`, and by the same without knowing of the cache."""
    case = cases("demo-fp32")
    manifest = Graphs(case.bundle).manifest
    with open_checkpoint(case.source) as checkpoint:
        weights = StoredWeights(
            lambda name: checkpoint.tensors[name].read(), WeightPlan.uniform("fp32")
        )
        steps = steps_from_ranges(Statistics.open(case.statistics).channel_max, checkpoint.spec)
        found = verify_bundle(case.bundle, manifest, checkpoint, weights, steps)
        assert max(place.worst for place in found.places) <= TOLERANCES["int8-cache"].hidden
        assert found.logits.typical <= EXACT
        with pytest.raises(VerificationError, match="attended of layer 0"):
            verify_bundle(case.bundle, manifest, checkpoint, weights)
