"""`neo-export --verify`: compares the bundle's values with PyTorch's, place by place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from neo_runtime.errors import VerificationError

from neo_export.bundle.check import scoring_graph
from neo_export.comparison.errors import measure, measure_logits
from neo_export.comparison.explanations import explain
from neo_export.comparison.faults import Fault, find_faults
from neo_export.comparison.places import all_places, place_text
from neo_export.comparison.probed import open_probed, score_trace
from neo_export.comparison.reference import LayeredReference
from neo_export.comparison.trace import Text
from neo_export.tolerances import HALVES, TOLERANCES, limits_name, tolerance_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from neo_runtime.bundle.manifest import Manifest
    from numpy.typing import NDArray

    from neo_export.checkpoint.whole import Checkpoint
    from neo_export.quantize.kv_cache import CacheSteps

__all__ = ["PlaceError", "Verification", "verify_bundle"]


@dataclass(frozen=True)
class PlaceError:
    """Worst relative L2 error over positions, at one place."""

    layer: int | None
    place: str
    error: float


@dataclass(frozen=True)
class Verification:
    """The errors of a bundle."""

    tokens: int
    window_size: int
    logits_error: float
    """Worst relative L2 error of a position's logits."""
    typical_error: float
    """Median of the same error over positions."""
    argmax_disagreements: int
    """Positions whose best token differs, although the reference's lead over its second best
    exceeds what the tolerance lets two logits be off."""
    worst_place: PlaceError
    places: tuple[PlaceError, ...]
    first_fault: Fault | None
    """The first step that is wrong even on the bundle's own inputs."""


def verify_bundle(
    folder: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    weights: Callable[[str], NDArray[np.float32]],
    cache: CacheSteps | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Score one text of token ids that crosses the window, and compare every place of every layer.

    The ids are random with a fixed seed: they need no tokenizer, and may be any row of the table.

    Args:
        folder: the bundle.
        manifest: its manifest.
        checkpoint: the checkpoint of the bundle.
        weights: returns each weight as the score graph stores it, by its name in the checkpoint.
        cache: the steps of an int8 cache.
        progress: called with a stage's name, done and total.

    Raises:
        VerificationError: an error exceeds the tolerance of this precision; the message names the
            first.
        DependencyError: torch or transformers is missing.
    """
    reference = LayeredReference(checkpoint, weights, cache)
    length = min(manifest.max_length, 2 * manifest.model.window_size + 32)
    ids = np.random.default_rng(0).integers(0, manifest.model.vocab_size, length, dtype=np.int64)
    trace = score_trace(open_probed(folder, manifest, "score"), manifest, ids)
    say = progress or (lambda stage, done, total: None)
    texts = [Text(ids, [trace])]
    errors, [final] = measure(
        reference,
        texts,
        lambda done, total: say("comparing with PyTorch", done, total),
    )
    expected = reference.logits(final)
    measure_logits(errors, reference, trace, expected)
    places = tuple(
        PlaceError(layer, place, float(series.cumulative.max()))
        for layer, place in all_places(manifest.model)
        if place != "logits" and (series := errors.series("score", (layer, place))) is not None
    )
    logits = errors.series("score", (None, "logits"))
    assert logits is not None
    assert trace.logits is not None
    faults = find_faults(errors, manifest.model, limits_name(manifest))
    rounds_activations = _rounds_activations(folder, manifest)
    tolerance = TOLERANCES[tolerance_name(manifest, rounds_activations=rounds_activations)]
    verification = Verification(
        tokens=length,
        window_size=manifest.model.window_size,
        logits_error=float(logits.cumulative.max()),
        typical_error=float(np.median(logits.cumulative)),
        argmax_disagreements=_disagreements(trace.logits, expected, tolerance.any_checkpoint),
        worst_place=max(places, key=lambda place: place.error),
        places=places,
        first_fault=explain(faults, reference, texts),
    )
    _judge(verification, manifest, rounds_activations)
    return verification


def _rounds_activations(folder: Path, manifest: Manifest) -> bool:
    """Whether the products of a bundle with quantized weights round their inputs, too."""
    if manifest.cache.dtype not in HALVES:
        return True
    graph = ir.load(folder / manifest.graphs[scoring_graph(manifest.graphs)].file).graph
    return any(node.op_type == "QuantizeLinear" for node in graph)


def _disagreements(found: NDArray[Any], expected: NDArray[np.float32], limit: float) -> int:
    """Positions whose best token differs, although its lead in `expected` is clear.

    An error of `limit` (relative L2), spread evenly, puts each logit off by `limit` times the root
    mean square of its row, and so may swap two that are less than twice that apart. The norm hides
    an error that only a few of many logits have; this finds it.
    """
    if expected.shape[-1] < 2:
        return 0
    best = np.partition(expected, -2, axis=-1)
    lead = best[:, -1] - best[:, -2]
    size = np.sqrt(np.mean(np.square(expected, dtype=np.float64), axis=-1))
    differs = found.argmax(axis=-1) != expected.argmax(axis=-1)
    return int(np.count_nonzero(differs & (lead > 2 * limit * size)))


def _judge(verification: Verification, manifest: Manifest, rounds_activations: bool) -> None:
    fault = verification.first_fault
    if fault is not None:
        why = f"; it looks like {fault.kind}" if fault.kind else ""
        raise VerificationError(
            f"{fault.where} is wrong: computed by PyTorch from the bundle's own inputs it is off "
            f"by {fault.error:.3g} ({fault.region}; relative L2, the limit of "
            f"{limits_name(manifest)} is {fault.limit:g}){why}. Report this with the checkpoint's "
            "config.json"
        )
    name = tolerance_name(manifest, rounds_activations=rounds_activations)
    tolerance = TOLERANCES[name]
    for place in verification.places:
        allowed = tolerance.of_place(place.place)
        if not place.error <= allowed:
            raise VerificationError(
                f"{place_text(place.layer, place.place)} is off by {place.error:.3g} (relative L2, "
                f"worst of {verification.tokens} positions), the limit of {name} is {allowed:g}"
            )
    limit = tolerance.any_checkpoint
    if not verification.logits_error <= limit:
        raise VerificationError(
            f"the logits are off by {verification.logits_error:.3g} (relative L2, worst of "
            f"{verification.tokens} positions), the limit of {name} is {limit:g}"
        )
    # Rounded activations may change the order of the best two tokens even in a correct bundle.
    judged = tolerance.typical is None
    if judged and verification.argmax_disagreements:
        raise VerificationError(
            f"the best token differs from PyTorch's at {verification.argmax_disagreements} of "
            f"{verification.tokens} positions where its lead exceeds what the limit of {name} "
            f"({limit:g}) allows two logits to be off: a few logits are wrong"
        )
