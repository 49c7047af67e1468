"""Faults made on purpose are named with their layer, place and region; where none is, none is."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers import faults
from helpers.faults import CONFIG, EXPORTS, Fault, drawn, spoiled_bundle, spoiled_checkpoint
from helpers.held_out import held_out_ids
from helpers.int8_cache import calibrated
from helpers.locating import locate
from helpers.models import DEMO, make_checkpoint, random_ids
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.comparison.held_weights import open_held_weights
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.targets import Quantization
from neo_runtime.bundle.folder import open_bundle
from neo_tools.diff.references import open_reference
from neo_tools.diff.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from neo_export.comparison.faults import Fault as Found
    from neo_tools.diff.references import Reference
    from numpy.typing import NDArray

WINDOW = CONFIG.window_size


class Bench:
    """A checkpoint, its bundles, and a way to spoil them."""

    def __init__(self, checkpoint: Path, exports: dict[str, ExportOptions], folder: Path) -> None:
        self.checkpoint, self.exports, self.folder = checkpoint, exports, folder
        self._made = 0
        self.clean = functools.cache(self._clean)

    def _clean(self, export: str) -> Path:
        return self._exported(self.checkpoint, export)

    def spoiled(self, export: str, fault: Fault) -> Path:
        if fault.graph is not None:
            self._made += 1
            return spoiled_bundle(self.clean(export), self.folder / f"graph{self._made}", fault)
        self._made += 1
        folder = self.folder / f"checkpoint{self._made}"
        return self._exported(spoiled_checkpoint(self.checkpoint, folder, fault), export)

    def _exported(self, checkpoint: Path, export: str) -> Path:
        self._made += 1
        bundle = self.folder / f"bundle{self._made}"
        export_bundle(str(checkpoint), bundle, self.exports[export])
        return bundle


def find(
    bundle: Path, reference: Reference, contexts: list[NDArray[np.int64]], **changes: int
) -> list[Found]:
    values = {"decode_positions": 16, "prefill_chunk": 7, "threads": 1, **changes}
    settings = Settings(bundle=bundle, reference="", **values)
    return locate(open_bundle(bundle), reference, contexts, settings)


def assert_named(found: list[Found], fault: Fault) -> None:
    assert found, f"{fault.name}: nothing was found"
    first = found[0]
    assert first.layer == fault.layer, (fault.name, first)
    assert first.place in fault.places, (fault.name, first)
    assert first.region in fault.regions, (fault.name, first)
    assert set(first.graphs) & set(fault.graphs), (fault.name, first)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("tiny")
    return Bench(make_checkpoint(folder / "checkpoint", CONFIG), EXPORTS, folder)


@pytest.fixture(scope="module")
def tiny_reference(tiny: Bench) -> Iterator[Reference]:
    with open_reference(str(tiny.checkpoint), threads=1) as reference:
        yield reference


def tiny_texts(seed: int) -> list[NDArray[np.int64]]:
    """Two contexts, each to the model's last position or a little less."""
    generator = np.random.default_rng(seed)
    end = CONFIG.max_position_embeddings
    return [
        random_ids(CONFIG, int(generator.integers(end - 8, end + 1)), seed=10 * seed + number)
        for number in range(2)
    ]


@pytest.mark.parametrize("seed", range(50))
def test_fifty_random_faults(seed: int, tiny: Bench, tiny_reference: Reference) -> None:
    """Layer, place, kind, precision and target at random. All are named, not 48."""
    export, fault = drawn(seed)
    assert_named(find(tiny.spoiled(export, fault), tiny_reference, tiny_texts(seed)), fault)


@pytest.mark.parametrize("seed", range(50))
def test_no_false_alarm(seed: int, tiny: Bench, tiny_reference: Reference) -> None:
    """As many clean runs: other texts, other chunks, every precision and target in turn."""
    export = list(EXPORTS)[seed % len(EXPORTS)]
    chunk = int(np.random.default_rng(seed).integers(1, 20))
    texts = tiny_texts(100 + seed)
    assert find(tiny.clean(export), tiny_reference, texts, prefill_chunk=chunk) == []


KINDS: dict[str, tuple[Callable[[], Fault], str]] = {
    "k_proj": (lambda: faults.wrong_matrix(1, "k_proj", 3), "k_proj of layer 3"),
    "v_proj": (lambda: faults.wrong_matrix(2, "v_proj", 0), "v_proj of layer 0"),
    "q_proj": (lambda: faults.transposed(0, "q_proj"), "q_proj transposed"),
    "out_proj": (lambda: faults.wrong_matrix(3, "out_proj", 1), "out_proj of layer 1"),
    "c_fc": (lambda: faults.wrong_matrix(1, "c_fc", 0), "c_fc of layer 0"),
    "c_proj": (lambda: faults.wrong_matrix(2, "c_proj", 1), "c_proj of layer 1"),
    "bias": (lambda: faults.missing_bias(0, "c_proj"), "c_proj without its bias"),
    "swapped": (lambda: faults.swapped_layers(1, 3), "the weights of layer 3"),
    "positions": (lambda: faults.shifted_positions(1), "position rows shifted by +1"),
    "window+1": (lambda: faults.other_window(9, 8, 1), "a window of 9 in place of 8"),
    "window-1": (lambda: faults.other_window(7, 8, 1), "a window of 7 in place of 8"),
    "all global": (lambda: faults.without_window((1, 3)), "a local layer without its window"),
    "scaled": (lambda: faults.scaled(2, CONFIG.head_dim), "scores scaled by 1/√d"),
    "late cache": (
        lambda: faults.late_cache(0, "key", "prefill"),
        "a cache written one position late",
    ),
}


@pytest.mark.parametrize("export", ["cpu-fp32", "cpu-int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_usual_mistakes_are_recognised(
    kind: str, export: str, tiny: Bench, tiny_reference: Reference
) -> None:
    make, expected = KINDS[kind]
    found = find(tiny.spoiled(export, make()), tiny_reference, tiny_texts(0))
    assert_named(found, make())
    assert found[0].kind == expected


def test_a_norm_is_told_from_the_projections_behind_it(
    tiny: Bench, tiny_reference: Reference
) -> None:
    for export in ("cpu-fp32", "cpu-int4"):
        fault = faults.wrong_matrix(2, "ln_1", 0)
        found = find(tiny.spoiled(export, fault), tiny_reference, tiny_texts(1))
        assert (found[0].layer, found[0].place) == (2, "ln_1")


@pytest.mark.parametrize("export", ["cpu-fp32", "cpu-int8"])
def test_a_norm_of_prefill_before_queries_of_chosen_positions(
    export: str, tiny: Bench, tiny_reference: Reference
) -> None:
    """The last layer's: there queries are fewer than keys and values."""
    fault = faults.other_norm(len(CONFIG.attention_layers) - 1, 0, "prefill")
    found = find(tiny.spoiled(export, fault), tiny_reference, tiny_texts(1))
    # Not of which region: chosen positions lie in some of them.
    assert (found[0].layer, found[0].place, found[0].graphs) == (fault.layer, "ln_1", fault.graphs)


@pytest.mark.parametrize("graph", ["score", "prefill", "decode"])
def test_the_faulty_graph_is_named(graph: str, tiny: Bench, tiny_reference: Reference) -> None:
    fault = faults.scaled(1, CONFIG.head_dim, (graph,))
    found = find(tiny.spoiled("cpu-int8", fault), tiny_reference, tiny_texts(2))
    assert found[0].graphs == (graph,)


@pytest.mark.parametrize("export", ["cpu-fp32", "cpu-int8", "cpu-int4"])
def test_a_few_positions_of_many(export: str, tiny: Bench, tiny_reference: Reference) -> None:
    """No median sees them."""
    fault = faults.few_positions(20, 24)
    assert_named(find(tiny.spoiled(export, fault), tiny_reference, tiny_texts(5)), fault)


def test_a_slot_that_nobody_wrote(tiny: Bench, tiny_reference: Reference) -> None:
    fault = faults.unwritten_slot(0, 3)
    found = find(tiny.spoiled("cpu-fp32", fault), tiny_reference, tiny_texts(6))
    assert (found[0].layer, found[0].place, found[0].graphs[0]) == (0, "cached_value", "prefill")
    assert not np.isfinite(found[0].error)


def test_a_matrix_that_is_rounded_otherwise_is_named(tiny: Bench, tmp_path: Path) -> None:
    """Seven eighths of it: less than what int4 is allowed."""

    def smaller(tensors: faults.Tensors) -> None:
        tensors["transformer.h.2.mlp.c_fc.weight"] *= np.float32(0.875)

    fault = Fault("smaller", 2, ("mlp",), weights=smaller)
    for bundle, named in (
        (tiny.clean("cpu-int4"), False),
        (tiny.spoiled("cpu-int4", fault), True),
    ):
        with open_reference(str(tiny.checkpoint), threads=1) as reference:
            find(bundle, reference, tiny_texts(7))
            said = [w for w in reference.warnings if "transformer.h.2.mlp.c_fc.weight" in w]
        assert bool(said) == named


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weights_alone_are_quantized_for_cuda(
    precision: str, tiny: Bench, tiny_reference: Reference, tmp_path: Path
) -> None:
    """So a step computed from the very integers is as close as float16's."""

    def larger(tensors: faults.Tensors) -> None:
        tensors["transformer.h.2.ln_2.weight"] *= np.float32(1.05)

    fault = Fault("larger", 2, ("mlp",), weights=larger)
    spoiled = spoiled_checkpoint(tiny.checkpoint, tmp_path / "spoiled", fault)
    quantization = Quantization(block_size=16 if precision == "int4" else None)
    options = ExportOptions(target="cuda", precision=precision, quantization=quantization)
    for source, name in ((tiny.checkpoint, "right"), (spoiled, "wrong")):
        export_bundle(str(source), tmp_path / name, options)
    bundle = open_bundle(tmp_path / "right")
    with open_checkpoint(tiny.checkpoint) as checkpoint:
        held = open_held_weights(
            bundle.path, bundle.manifest, lambda name: checkpoint.tensors[name].read()
        )["decode"]
        for matrix in ("c_fc", "c_proj"):
            held(f"transformer.h.2.mlp.{matrix}.weight")
    assert held.covers((2, "mlp"), tied=True)
    assert find(tmp_path / "right", tiny_reference, tiny_texts(8)) == []
    found = find(tmp_path / "wrong", tiny_reference, tiny_texts(8))
    assert_named(found, fault)
    assert 1e-2 < found[0].error < 1e-1


@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
def test_other_targets(target: str, tiny: Bench, tiny_reference: Reference, tmp_path: Path) -> None:
    """A bundle for a GPU by its graphs, those that plans are built from included."""
    weights = faults.wrong_matrix(3, "out_proj", 1)
    spoiled = spoiled_checkpoint(tiny.checkpoint, tmp_path / "spoiled", weights)
    options = ExportOptions(target=target, precision="fp16")
    for source, fault in ((tiny.checkpoint, None), (spoiled, weights)):
        bundle = tmp_path / source.name / target
        bundle.parent.mkdir(exist_ok=True)
        export_bundle(str(source), bundle, options)
        found = find(bundle, tiny_reference, tiny_texts(4))
        if fault is None:
            assert found == []
        else:
            assert_named(found, fault)


def test_an_int8_cache(tiny: Bench, tiny_reference: Reference, tmp_path: Path) -> None:
    """What the integers mean is read from the graphs: attention and cache are judged closely."""
    ids = random_ids(CONFIG, 8, CONFIG.max_position_embeddings, seed=77)
    statistics = calibrated(tiny.checkpoint, ids, tmp_path / "statistics")
    options = ExportOptions(kv_cache="int8", calibration=statistics)
    export_bundle(str(tiny.checkpoint), tmp_path / "bundle", options)
    assert find(tmp_path / "bundle", tiny_reference, list(ids[:2])) == []
    for number, fault in enumerate(
        (faults.window_of(3, WINDOW - 1, WINDOW), faults.late_cache(2, "key", "decode"))
    ):
        bundle = spoiled_bundle(tmp_path / "bundle", tmp_path / f"spoiled{number}", fault)
        assert_named(find(bundle, tiny_reference, list(ids[:2])), fault)


def test_a_bundle_against_another(tiny: Bench) -> None:
    """Without PyTorch there are accumulated errors; the first place is sure."""
    fault = faults.wrong_matrix(2, "out_proj", 0)
    bundle = tiny.spoiled("cpu-fp32", fault)
    with open_reference(str(tiny.clean("portable-fp32")), threads=1) as reference:
        assert find(tiny.clean("cpu-fp32"), reference, tiny_texts(3)) == []
        assert_named(find(bundle, reference, tiny_texts(3)), fault)


DEMO_EXPORTS = {
    "fp32": ExportOptions(),
    "int4": ExportOptions(precision="int4", quantization=Quantization(block_size=32)),
    # Decode reads other integers than the graph that scores.
    "int4-int8": ExportOptions(precision="int4", quantization=Quantization(int8_prefill=True)),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(DEMO, DEMO_EXPORTS, tmp_path_factory.mktemp("demo"))


@pytest.mark.parametrize("export", [name for name in DEMO_EXPORTS if name != "fp32"])
def test_one_short_context_raises_no_alarm(export: str, demo: Bench) -> None:
    """The only position at the window's edge is a worst position, whose median says nothing."""
    pieces = held_out_ids(24, 66)
    with open_reference(str(DEMO), threads=1) as reference:
        for number, piece in enumerate(pieces):
            ids = [piece[: 64 + number % 3]]
            assert find(demo.clean(export), reference, ids, prefill_chunk=100) == [], number


@pytest.mark.parametrize("export", DEMO_EXPORTS)
def test_the_demo_model(export: str, demo: Bench) -> None:
    """Trained weights and text: the window off by one either way, a wrong matrix, and none."""
    ids = [held_out_ids(1, 256)[0]]
    with open_reference(str(DEMO), threads=1) as reference:
        assert find(demo.clean(export), reference, ids, prefill_chunk=100) == []
        for fault in (
            faults.other_window(65, 64, 1),
            faults.other_window(63, 64, 1),
            faults.wrong_matrix(2, "c_proj", 1),
            # Less than the rounding of int4 weights: seen because that is left out of account.
            faults.wrong_matrix(2, "ln_1", 1),
            faults.missing_bias(1, "c_proj"),
            faults.shifted_positions(1),
        ):
            found = find(demo.spoiled(export, fault), reference, ids, prefill_chunk=100)
            assert_named(found, fault)
