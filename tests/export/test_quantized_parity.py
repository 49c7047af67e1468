"""int8 and int4 against PyTorch on the dequantized weights, at every position.

Each bundle is compared twice. With activations left exact, in copies of its graphs, only the order
of float32 sums differs, so the limit is that of float32: a wrong window or layer cannot hide. As
shipped, activations are rounded as well, and the limits are those of the precision.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.dequantized import (
    altered,
    dequantized_checkpoint,
    exact_activations,
    scaled_attention,
    swapped_layers,
    window,
)
from helpers.held_out import held_out_ids
from helpers.models import DEMO, ODD_CONFIGS, Reference, make_checkpoint, random_ids
from helpers.passages import passages
from helpers.running import Graphs, assert_agrees, relative_l2
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.comparison.verify import verify_bundle
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.quantize.plan import Storage, WeightPlan
from neo_export.quantize.stored import StoredWeights
from neo_export.targets import Quantization
from neo_export.tolerances import TOLERANCES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

EXACT = TOLERANCES["fp32"].logits
DEMO_CASES = ("demo-int8", "demo-int4-32", "demo-int4-64", "demo-mixed-32")
TINY = (
    "plain",
    "untied_head",
    "all_global",
    "all_local",
    "local_first",
    "window_1",
    "window_4",
    "window_beyond_end",
    "head_size_4",
    "head_size_80",
)
TINY_CASES = tuple(f"{name}-{precision}" for name in TINY for precision in ("int8", "int4-16"))
TINY_CASES += ("plain-mixed-16", "untied_head-mixed-16", "head_size_4-mixed-16")


def mixed_plan(block: int) -> WeightPlan:
    """Each storage in each kind of place, a layer whose q, k and v differ among them."""
    int8, fp32, half = Storage("int8"), Storage("fp32"), Storage("int4", block // 2)
    layer = "transformer.h.{}.attn.attention.{}_proj.weight"
    return WeightPlan(
        Storage("int4", block),
        (
            ("transformer.wte.weight", int8 if block == 32 else Storage("int4", block)),
            (layer.format(0, "q"), int8),
            (layer.format(0, "v"), fp32),
            ("transformer.h.0.mlp.c_proj.weight", half if block > 16 else int8),
            (layer.format(1, "out"), fp32),
            ("transformer.h.1.mlp.c_fc.weight", int8),
        ),
    )


@dataclass(frozen=True)
class Case:
    """A quantized bundle, and what PyTorch gives on the weights that it holds."""

    precision: str
    shipped: Path
    exact: Path
    """The same with activations left exact."""
    checkpoint: Path
    """The dequantized one."""
    ids: NDArray[np.int64]
    """[1, S]: as many as the model has positions."""
    logits: NDArray[np.float32]
    """[1, S, V]"""
    window: int


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """By name: configuration, precision, block size. Made once."""

    @functools.cache
    def make(name: str) -> Case:
        model, precision, *block = name.split("-")
        folder = tmp_path_factory.mktemp(name)
        quantization = Quantization(block_size=int(block[0])) if block else Quantization()
        if precision == "mixed":
            quantization = Quantization(plan=mixed_plan(int(block[0])))
        if model == "demo":
            source, ids, size = DEMO, held_out_ids(1, 512), 64
        else:
            config = ODD_CONFIGS[model]
            source = make_checkpoint(folder / "checkpoint", config)
            ids = random_ids(config, 1, config.max_position_embeddings)
            size = config.window_size
        read_back = dequantized_checkpoint(source, folder / "read-back", precision, quantization)
        options = ExportOptions(precision=precision, quantization=quantization)
        export_bundle(str(source), folder / "bundle", options)
        exact = altered(folder / "bundle", folder / "exact", exact_activations)
        logits = Reference(read_back).logits(ids)
        return Case(precision, folder / "bundle", exact, read_back, ids, logits, size)

    return make


def ways(
    graphs: Graphs, case: Case
) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
    """`passages` of a case."""
    return passages(graphs, case.ids, case.logits, case.window)


def errors(graphs: Graphs, case: Case) -> NDArray[np.float64]:
    """Relative L2 of every position of every passage."""
    every = [relative_l2(found, expected) for _, found, expected in ways(graphs, case)]
    return np.concatenate([error.ravel() for error in every])


def exact_graphs(folder: Path) -> Graphs:
    """As they are: onnxruntime's rewrites would round activations to 8 bits again."""
    return Graphs(folder, optimize=False)


@pytest.mark.parametrize("name", DEMO_CASES + TINY_CASES)
def test_with_exact_activations(name: str, cases: Callable[[str], Case]) -> None:
    case = cases(name)
    for _, found, expected in ways(exact_graphs(case.exact), case):
        assert_agrees(found, expected, EXACT)


@pytest.mark.parametrize("name", DEMO_CASES + TINY_CASES)
def test_as_shipped(name: str, cases: Callable[[str], Case]) -> None:
    case, typical = cases(name), []
    limit = TOLERANCES[case.precision]
    assert limit.typical is not None
    for passage, found, expected in ways(Graphs(case.shipped), case):
        assert_agrees(found, expected, limit.logits)
        if passage in ("score", "decode"):
            typical.append(np.median(relative_l2(found, expected)))
    assert max(typical) <= limit.typical


CHANGES = {
    "window+1": window(1),
    "window-1": window(-1),
    "scaled": scaled_attention,
    "swapped": swapped_layers,
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, change) for name in ("plain-int8", "plain-int4-16") for change in CHANGES),
        *((name, "window+1") for name in ("demo-int8", "demo-int4-64")),
    ],
)
def test_a_wrong_graph_is_found_out(
    name: str, change: str, cases: Callable[[str], Case], tmp_path: Path
) -> None:
    """Both comparisons see it: the exact one by orders of magnitude."""
    case = cases(name)
    wrong = altered(case.exact, tmp_path / "exact", CHANGES[change])
    assert errors(exact_graphs(wrong), case).max() > 1000 * EXACT
    wrong = altered(case.shipped, tmp_path / "shipped", CHANGES[change])
    limit = TOLERANCES[case.precision]
    assert errors(Graphs(wrong), case).max() > limit.logits


@pytest.mark.parametrize(
    "name", ["demo-int8", "demo-int4-64", "demo-mixed-32", "plain-int8", "local_first-int4-16"]
)
def test_every_place_of_every_layer(name: str, cases: Callable[[str], Case]) -> None:
    """Hidden states between the layers, by the comparison that `neo-export --verify` makes.

    It raises where a place is past its limit. Its text is of random ids, rarer than real ones.
    """
    case = cases(name)
    graphs = Graphs(case.shipped)
    with open_checkpoint(case.checkpoint) as checkpoint:
        weights = StoredWeights(
            lambda name: checkpoint.tensors[name].read(), WeightPlan.uniform("fp32")
        )
        found = verify_bundle(case.shipped, graphs.manifest, checkpoint, weights)
    assert len(found.places) == len(graphs.manifest.probes)
    limit = TOLERANCES[case.precision]
    assert max(place.worst for place in found.places) <= limit.hidden
    assert limit.typical is not None
    assert found.logits.typical <= limit.typical
