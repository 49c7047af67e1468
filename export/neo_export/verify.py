"""`neo-export --verify`: the bundle's numbers against PyTorch, place by place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from neo_runtime.errors import VerificationError
from neo_runtime.installation import require_onnxruntime
from neo_runtime.manifest import is_quantized

from neo_export.check import run_graph
from neo_export.reference import LayeredReference
from neo_export.tolerances import TOLERANCES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from neo_runtime.manifest import Manifest, Probe
    from numpy.typing import NDArray

    from neo_export.checkpoint import Checkpoint
    from neo_export.quantize.stored import StoredWeights

__all__ = ["PlaceError", "Verification", "relative_l2", "verify_bundle"]


@dataclass(frozen=True)
class PlaceError:
    """Worst relative L2 error over positions, at one place."""

    layer: int | None
    place: str
    error: float


@dataclass(frozen=True)
class Verification:
    """How far the bundle is off."""

    tokens: int
    window_size: int
    logits_error: float
    """Worst relative L2 error of a position's logits."""
    typical_error: float
    """The median over positions."""
    argmax_disagreements: int
    """Positions whose best token differs although the reference's lead exceeds the error."""
    worst_place: PlaceError
    places: tuple[PlaceError, ...]


def relative_l2(found: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
    """‖found − reference‖ / ‖reference‖ along the last axis, in float64."""
    difference = found.astype(np.float64) - reference.astype(np.float64)
    norm = np.linalg.norm(reference.astype(np.float64), axis=-1)
    result: NDArray[np.float64] = np.linalg.norm(difference, axis=-1) / np.maximum(norm, 1e-30)
    return result


def verify_bundle(
    folder: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    weights: StoredWeights,
    progress: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Score one text of token ids that crosses the window, and compare every place of every layer.

    The ids are seeded random ones: they need no tokenizer, and reach any row of the table.

    Args:
        folder: the bundle.
        manifest: its manifest.
        checkpoint: what it was made of.
        weights: the checkpoint's weights as the score graph has them.
        progress: called with a stage's name, done and total.

    Raises:
        VerificationError: an error is past the tolerance of this precision; the first is named.
        DependencyError: torch or transformers is missing.
    """
    reference = LayeredReference(checkpoint, weights)
    length = min(manifest.max_length, 2 * manifest.model.window_size + 32)
    ids = np.random.default_rng(0).integers(0, manifest.model.vocab_size, length, dtype=np.int64)
    outputs = _run_with_probes(folder, manifest, ids)
    probes = {(probe.layer, probe.place): probe for probe in manifest.probes}
    places, final = [], None
    for done, ((layer, place), expected) in enumerate(reference.places(ids), start=1):
        found = _probed(outputs, probes[layer, place])
        places.append(PlaceError(layer, place, float(relative_l2(found, expected).max())))
        final = expected
        if progress is not None:
            progress("comparing with PyTorch", done, len(probes))
    assert final is not None
    expected = reference.logits(final)
    found = outputs["logits"][0]
    errors = relative_l2(found, expected)
    verification = Verification(
        tokens=length,
        window_size=manifest.model.window_size,
        logits_error=float(errors.max()),
        typical_error=float(np.median(errors)),
        argmax_disagreements=_disagreements(found, expected),
        worst_place=max(places, key=lambda place: place.error),
        places=tuple(places),
    )
    _judge(verification, manifest.precision)
    return verification


def _run_with_probes(
    folder: Path, manifest: Manifest, ids: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    """Outputs of the score graph, and the values of all probes as outputs beside them."""
    ort = require_onnxruntime()
    graph = manifest.graphs["score"]
    model = ir.load(folder / graph.file)
    values = {value.name: value for node in model.graph for value in node.outputs}
    for name in dict.fromkeys(probe.value for probe in manifest.probes):
        model.graph.outputs.append(values[name])
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not is_quantized(manifest.precision):
        # Quantized products have other kernels for prepacked weights: check those that will run.
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    data = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return run_graph(session, graph, ids[None], manifest.cache.window)


def _probed(outputs: dict[str, NDArray[Any]], probe: Probe) -> NDArray[Any]:
    value: NDArray[Any] = outputs[probe.value][0]
    return value if probe.channels is None else value[:, slice(*probe.channels)]


def _disagreements(found: NDArray[Any], expected: NDArray[np.float32]) -> int:
    best = np.partition(expected, -2, axis=-1)
    lead = best[:, -1] - best[:, -2]
    off = np.abs(found.astype(np.float64) - expected).max(axis=-1)
    differs = found.argmax(axis=-1) != expected.argmax(axis=-1)
    return int(np.count_nonzero(differs & (lead > off)))


def _judge(verification: Verification, precision: str) -> None:
    limit = TOLERANCES[precision].any_checkpoint
    for place in verification.places:
        if not place.error <= limit:
            where = place.place if place.layer is None else f"{place.place} of layer {place.layer}"
            raise VerificationError(
                f"{where} is off by {place.error:.3g} (relative L2, worst of "
                f"{verification.tokens} positions), the limit of {precision} is {limit:g}"
            )
    # Where activations are rounded, the best two tokens move apart or together at will.
    judged = TOLERANCES[precision].typical is None
    disagreements = verification.argmax_disagreements if judged else 0
    if not verification.logits_error <= limit or disagreements:
        raise VerificationError(
            f"the logits are off by {verification.logits_error:.3g} (relative L2, worst of "
            f"{verification.tokens} positions; limit of {precision}: {limit:g}), with "
            f"{disagreements} positions whose best token differs"
        )
