"""Exports of checkpoints by the peers' own exporters, each kept for later calls."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neo_runtime.errors import CheckpointError, NeoError, RequestError

from neo_tools.peers.environments import peer_environ, python_of, root_folder, spec_of
from neo_tools.peers.measure import Measured, run_measured

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ExportReport", "ensure_export", "export_time", "exported_folder"]

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_SAMPLE = 1 << 20

_OPTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("optimum", "fp32"): ("onnx",),
    ("openvino", "fp32"): ("openvino", "--weight-format", "fp32"),
    # One scale and zero point per row of every matrix, embeddings and head included.
    ("openvino", "int8"): ("openvino", "--weight-format", "int8"),
    # optimum-intel's defaults for int4, written out: asymmetric, groups of 128, all layers except
    # the embeddings and the head, which get int8. `adjust` matters only if 128 does not divide a
    # width (neo-mini).
    ("openvino", "int4"): (
        "openvino",
        "--weight-format",
        "int4",
        "--group-size",
        "128",
        "--ratio",
        "1.0",
        "--group-size-fallback",
        "adjust",
    ),
}
"""Arguments of `optimum-cli export`, by peer and precision."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Measurements of one export."""

    seconds: float
    peak_rss: int
    """Peak resident memory in bytes (polled, so a lower bound)."""
    peak_rss_anon: int
    """Peak anonymous memory in bytes (polled, so a lower bound)."""
    folder_bytes: int
    """Total size of the files written."""
    command: tuple[str, ...]


def exported_folder(peer: str, model: Path, precision: str, root: Path | None = None) -> Path:
    """The folder of a model's export, which depends on the versions of the peer's packages.

    `ROOT/models/<name>-<digest>/<peer>-<precision>-<fingerprint>`

    Raises:
        CheckpointError: `model` is not a checkpoint.
        DependencyError: no peer has that name.
    """
    name = f"{model.resolve().name}-{_digest(model)}"
    made_by = spec_of(peer).fingerprint[:8]
    return root_folder(root) / "models" / name / f"{peer}-{precision}-{made_by}"


def ensure_export(peer: str, model: Path, precision: str, root: Path | None = None) -> Path:
    """The folder that the peer's worker loads; the model is exported unless that was done before.

    For a peer that loads checkpoints, that is `model` itself.

    Args:
        peer: name of the peer.
        model: folder of a checkpoint.
        precision: one of the peer's precisions.
        root: folder of the peers' environments; see `environments.root_folder`.

    Raises:
        CheckpointError: `model` is not a checkpoint.
        DependencyError: no peer has that name, or its environment is not set up.
        RequestError: the peer does not have the precision.
        NeoError: the exporter failed.
    """
    spec = spec_of(peer)
    spec.check_precision(precision)
    if not spec.exports:
        _digest(model)  # raises if it is not a checkpoint
        return model
    folder = exported_folder(peer, model, precision, root)
    if folder.is_dir():
        return folder
    python = python_of(peer, root)
    staged = folder.with_name(f".{folder.name}-{os.getpid()}")
    staged.parent.mkdir(parents=True, exist_ok=True)
    try:
        _export(peer, python, model, precision, staged)
        try:
            staged.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder


def export_time(model: Path, out: Path, root: Path | None = None) -> ExportReport:
    """Measure one run of `optimum-cli export onnx --task text-generation-with-past`.

    Args:
        model: folder of a checkpoint.
        out: folder to write; it must not exist.
        root: folder of the peers' environments.

    Raises:
        RequestError: `out` exists.
        CheckpointError, DependencyError, NeoError: as for `ensure_export`.
    """
    if out.exists():
        raise RequestError(
            f"{out} exists; name a folder that does not, so that no other files count"
        )
    _digest(model)
    python = python_of("optimum", root)
    measured = _export("optimum", python, model, "fp32", out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return ExportReport(
        seconds=measured.seconds,
        peak_rss=measured.peak_rss,
        peak_rss_anon=measured.peak_rss_anon,
        folder_bytes=size,
        command=("optimum-cli", *_command("optimum", python, model, "fp32", out)[1:]),
    )


def _export(peer: str, python: Path, model: Path, precision: str, out: Path) -> Measured:
    measured = run_measured(
        _command(peer, python, model, precision, out),
        what=f"export {model} for {peer} ({precision})",
        environ=peer_environ(),
    )
    expected = "model.onnx" if peer == "optimum" else "openvino_model.xml"
    if not (out / expected).is_file():
        raise NeoError(
            f"{peer} exported {model} without an error, but did not write {out / expected}; "
            f"its last lines:\n{measured.output}"
        )
    return measured


def _command(peer: str, python: Path, model: Path, precision: str, out: Path) -> tuple[str, ...]:
    return (
        str(python.parent / "optimum-cli"),
        "export",
        *_OPTIONS[peer, precision],
        "--task",
        "text-generation-with-past",
        "--model",
        str(model.resolve()),
        str(out),
    )


def _digest(model: Path) -> str:
    """Digest (8 hex digits) of the config, and of size and samples of each weight file."""
    config = model / "config.json"
    files = sorted({path for pattern in _WEIGHTS for path in model.glob(pattern)})
    if not config.is_file() or not files:
        raise CheckpointError(
            f"{model} is not a checkpoint: expected config.json and *.safetensors or "
            "pytorch_model*.bin in it; name a Hugging Face model folder"
        )
    digest = hashlib.sha256(config.read_bytes())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            for start in (0, size // 2, max(0, size - _SAMPLE)):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:8]
