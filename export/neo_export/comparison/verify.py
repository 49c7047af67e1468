"""`neo-export --verify`: compares the bundle's values with PyTorch's, place by place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from neo_runtime.errors import VerificationError

from neo_export.bundle.check import scoring_graph
from neo_export.comparison.errors import measure, measure_logits
from neo_export.comparison.explanations import explain
from neo_export.comparison.faults import Fault, find_faults
from neo_export.comparison.metrics import logit_error
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
    from neo_export.comparison.errors import PlaceErrors
    from neo_export.comparison.places import Place
    from neo_export.quantize.kv_cache import CacheSteps

__all__ = ["PlaceError", "Verification", "verify_bundle"]


@dataclass(frozen=True)
class PlaceError:
    """Relative L2 error at one place, accumulated from the first layer on."""

    layer: int | None
    place: str
    worst: float
    """Largest over positions; NaN or infinite if any is."""
    typical: float
    """Median over positions."""


@dataclass(frozen=True)
class Verification:
    """The errors of a bundle."""

    tokens: int
    window_size: int
    logits: PlaceError
    argmax_disagreements: int
    """Positions whose best token differs, although the reference's lead over its second best
    exceeds what the tolerance lets two logits be off."""
    worst_place: PlaceError
    """The place whose `typical` error is largest."""
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
        VerificationError: a step is wrong on its own inputs at some position, or the errors that
            accumulate exceed the tolerance of this precision; the message names the first place.
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
    found = [error for at in all_places(manifest.model) if (error := _error_at(errors, at))]
    [logits] = [error for error in found if error.place == "logits"]
    places = tuple(error for error in found if error is not logits)
    assert trace.logits is not None
    faults = find_faults(errors, manifest.model, limits_name(manifest))
    name = tolerance_name(manifest, rounds_activations=_rounds_activations(folder, manifest))
    limit = TOLERANCES[name].any_checkpoint
    verification = Verification(
        tokens=length,
        window_size=manifest.model.window_size,
        logits=logits,
        argmax_disagreements=_disagreements(trace.logits, expected, limit),
        worst_place=max(places, key=lambda place: place.typical),
        places=places,
        first_fault=explain(faults, reference, texts),
    )
    _judge(verification, manifest, name)
    return verification


def _rounds_activations(folder: Path, manifest: Manifest) -> bool:
    """Whether the products of a bundle with quantized weights round their inputs, too."""
    if manifest.cache.dtype not in HALVES:
        return True
    graph = ir.load(folder / manifest.graphs[scoring_graph(manifest.graphs)].file).graph
    return any(node.op_type == "QuantizeLinear" for node in graph)


def _error_at(errors: PlaceErrors, at: Place) -> PlaceError | None:
    series = errors.series("score", at)
    if series is None:
        return None
    found = series.cumulative
    return PlaceError(*at, worst=float(found.max()), typical=float(np.median(found)))


def _disagreements(found: NDArray[Any], expected: NDArray[np.float32], limit: float) -> int:
    """Positions within `limit` whose best token differs, although its lead in `expected` is clear.

    An error of `limit` (relative L2), spread evenly, puts each logit off by `limit` times the root
    mean square of its row, and so may swap two that are less than twice that apart. The norm hides
    an error that only a few of many logits have; this finds it.
    """
    if expected.shape[-1] < 2:
        return 0
    best = np.partition(expected, -2, axis=-1)
    lead = best[:, -1] - best[:, -2]
    size = np.sqrt(np.mean(np.square(expected, dtype=np.float64), axis=-1))
    suspect = (lead > 2 * limit * size) & (logit_error(found, expected) <= limit)
    differs = found.argmax(axis=-1) != expected.argmax(axis=-1)
    return int(np.count_nonzero(suspect & differs))


def _judge(verification: Verification, manifest: Manifest, name: str) -> None:
    """Raise what is wrong; `name` is the bundle's key of `TOLERANCES`."""
    fault = verification.first_fault
    if fault is not None:
        why = f"; it looks like {fault.kind}" if fault.kind else ""
        raise VerificationError(
            f"{fault.where} is wrong: computed by PyTorch from the bundle's own inputs it is off "
            f"by {fault.error:.3g} ({fault.region}; relative L2, the limit of "
            f"{limits_name(manifest)} is {fault.limit:g}){why}. Report this with the checkpoint's "
            "config.json"
        )
    tolerance = TOLERANCES[name]
    limit = tolerance.any_checkpoint
    for place in (*verification.places, verification.logits):
        if not math.isfinite(place.worst):
            raise VerificationError(
                f"{place_text(place.layer, place.place)} holds values that are not finite, where "
                "PyTorch's are; export in a wider precision, such as --fp32"
            )
    # A checkpoint with sharp attention amplifies any rounding, at single positions without bound:
    # hence the median, and no limit for places. A wrong step is found on its own inputs.
    typical = verification.logits.typical
    if not typical <= limit:
        raise VerificationError(
            f"the logits are off by {typical:.3g} (relative L2, median of {verification.tokens} "
            f"positions), the limit of {name} is {limit:g}. Every step is right on its own inputs: "
            "this checkpoint amplifies their rounding; export it in a wider precision, or without "
            "--verify, and measure the loss on text with neo-diff"
        )
    # Rounded activations may change the order of the best two tokens even in a correct bundle.
    judged = tolerance.typical is None
    if judged and verification.argmax_disagreements:
        raise VerificationError(
            f"the best token differs from PyTorch's at {verification.argmax_disagreements} of "
            f"{verification.tokens} positions where its lead exceeds what the limit of {name} "
            f"({limit:g}) allows two logits to be off: a few logits are wrong"
        )
