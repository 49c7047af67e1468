"""The bundles and the checkpoint of a run, checked before anything is started."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from neo_runtime.backends.choice import automatic_backend
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.errors import BundleUnsupportedError, NeoError, RequestError
from neo_runtime.machine.gpu import require_gpu

from neo_tools.arguments import labels_of
from neo_tools.bench.cases import check_lengths
from neo_tools.bench.traffic import decode_weights
from neo_tools.model_shape import check_checkpoint, shape_text

if TYPE_CHECKING:
    from pathlib import Path

    from neo_runtime.bundle.manifest import Manifest

    from neo_tools.bench.cases import Settings
    from neo_tools.bench.traffic import StepWeights

__all__ = ["BundleInfo", "check_peers_model", "open_bundles"]


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """A participating bundle."""

    label: str
    path: Path
    manifest: Manifest
    weights: StepWeights


def open_bundles(settings: Settings) -> tuple[Settings, list[BundleInfo]]:
    """Open all bundles of a run.

    Returns:
        The settings with the chosen backend, and the bundles.

    Raises:
        BundleError: a bundle cannot be used.
        RequestError: a case does not fit a bundle, or the bundles are of different models.
        DependencyError: onnx, which reads the graphs, is not installed.
    """
    found = []
    backends = {}
    for label, path in zip(labels_of(settings.bundles), settings.bundles, strict=True):
        bundle = open_bundle(path)
        _refuse_without_gpu(settings, path, bundle.manifest)
        check_lengths(settings, bundle.manifest.max_length, str(path))
        graph = bundle.file(bundle.manifest.graphs["decode"].file)
        weights = decode_weights(graph)
        found.append(BundleInfo(label=label, path=path, manifest=bundle.manifest, weights=weights))
        if settings.backend == "auto":
            backends[label] = automatic_backend(bundle, settings.device)
    shapes = {info.label: shape_text(info.manifest.model) for info in found}
    if len(set(shapes.values())) > 1:
        listed = "; ".join(f"{label} has {shape}" for label, shape in shapes.items())
        raise RequestError(
            f"the bundles are different models, and figures of one say nothing of another: {listed}"
            "; run them one by one"
        )
    if settings.backend == "auto":
        settings = replace(settings, backend=_common(backends, peers=bool(settings.peers)))
    return settings, found


def _common(chosen: dict[str, str], *, peers: bool) -> str:
    """The backend that all bundles would run on; the machine's limit depends on it.

    Raises:
        RequestError: it is not the same for all bundles, or for the peers.
    """
    listed = ", ".join(f"{label} on {name}" for label, name in chosen.items())
    if len(set(chosen.values())) > 1:
        raise RequestError(
            f"the bundles would run on different machines ({listed}), whose figures do not "
            "compare; run them one by one, or name --backend"
        )
    name = next(iter(chosen.values()))
    if name != "cpu" and peers:
        raise RequestError(
            f"the bundles would run on a GPU ({listed}) and the peers on the CPU; name --backend "
            f"{name} for both, or --backend cpu"
        )
    return name


def _refuse_without_gpu(settings: Settings, path: Path, manifest: Manifest) -> None:
    """Refuse bundles that do not run on a CPU, before workers start."""
    if not manifest.needs_gpu:
        return
    why = "the CPU was asked for"
    if settings.backend != "cpu":
        try:
            require_gpu(settings.device)
            return
        except NeoError as error:
            why = str(error)
    raise BundleUnsupportedError(
        f"{path} ({manifest.target}, {manifest.precision}) runs on a GPU alone: {why}"
    )


def check_peers_model(settings: Settings, manifest: Manifest) -> None:
    """Check that the peers' checkpoint is the model that was exported.

    Raises:
        RequestError: there are peers, but no checkpoint.
        CheckpointError: it is not a checkpoint, or is of another model.
    """
    if not settings.peers:
        return
    if settings.model is None:
        raise RequestError("a peer runs the checkpoint itself; name its folder with --model")
    check_checkpoint(settings.model, manifest.model)
