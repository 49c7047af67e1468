"""Export a checkpoint with a peer's own exporter, once: later calls find the folder."""

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
    # One scale and zero point a row of every matrix, embeddings and head included.
    ("openvino", "int8"): ("openvino", "--weight-format", "int8"),
    # optimum-intel's own defaults for int4, spelled out: asymmetric, group 128, every layer but
    # the embeddings and the head, which take int8. `adjust` only matters where 128 does not
    # divide a width (neo-mini).
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
"""`optimum-cli export` and its arguments, by peer and precision."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """One export, measured."""

    seconds: float
    peak_rss: int
    """Bytes resident at most."""
    peak_rss_anon: int
    """Private bytes at most (polled)."""
    folder_bytes: int
    """Size of what was written."""
    command: tuple[str, ...]


def exported_folder(peer: str, model: Path, precision: str, root: Path | None = None) -> Path:
    """Where the export of this model lives, by the versions that made it.

    `ROOT/models/<name>-<digest>/<peer>-<precision>-<fingerprint>`
    """
    name = f"{model.resolve().name}-{_digest(model)}"
    made_by = spec_of(peer).fingerprint[:8]
    return root_folder(root) / "models" / name / f"{peer}-{precision}-{made_by}"


def ensure_export(peer: str, model: Path, precision: str, root: Path | None = None) -> Path:
    """The folder that the peer's worker loads: exported now, or found from an earlier call.

    A peer that loads checkpoints gets `model` itself.

    Raises:
        CheckpointError: `model` holds no checkpoint.
        DependencyError: the peer's environment is not set up.
        RequestError: a precision that the peer does not have.
        NeoError: the exporter failed.
    """
    spec = spec_of(peer)
    spec.check_precision(precision)
    if not spec.exports:
        _digest(model)  # raises where there is no checkpoint
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
    """Measure `optimum-cli export onnx --task text-generation-with-past` once.

    Args:
        model: a checkpoint's folder.
        out: folder to write; it must not exist.
        root: where the peers live.

    Raises:
        RequestError: `out` exists.
        CheckpointError, DependencyError, NeoError: see `ensure_export`.
    """
    if out.exists():
        raise RequestError(f"{out} exists; name a folder that does not, so that none is mixed up")
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
            f"{peer} exported {model} without an error, but {out / expected} is not there; "
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
    """8 hex digits that tell checkpoints apart: config, and each weight file's size and samples."""
    config = model / "config.json"
    files = sorted({path for pattern in _WEIGHTS for path in model.glob(pattern)})
    if not config.is_file() or not files:
        raise CheckpointError(
            f"{model} is not a checkpoint: expected config.json and *.safetensors or "
            "pytorch_model.bin in it; name a Hugging Face model folder"
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
