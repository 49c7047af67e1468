"""A check that portable bundles work in another runtime: Optimum's `ORTModelForCausalLM`."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neo_export.command.cli import DEMO
from neo_runtime.bundle.manifest import MANIFEST_NAME, Manifest
from neo_runtime.errors import (
    BundleError,
    BundleUnsupportedError,
    DependencyError,
    NeoError,
)

from neo_tools.model_shape import check_checkpoint
from neo_tools.peers.environments import peer_environ, python_of
from neo_tools.worker.engine import context_ids

__all__ = ["PortableReport", "load_portable"]

_START = Path(__file__).resolve().parent / "worker_start.py"
_LENGTHS = (1, 3, 9, 24, 40)
_NEW_TOKENS = 80


@dataclass(frozen=True, kw_only=True)
class PortableReport:
    """Comparison of greedy tokens: a bundle in Optimum, and its checkpoint in PyTorch eager."""

    prompts: int
    new_tokens: int
    alone_equal: int
    """Prompts whose tokens are equal if both models process them one by one."""
    batch_equal: int
    """Prompts whose tokens are equal if both models process them in one left-padded batch."""
    batch_equals_alone: int
    """Prompts whose tokens are equal in the bundle's batch and in PyTorch one by one."""
    versions: dict[str, str]
    bundle_io: dict[str, list[Any]]
    """Type and dimensions of every input and output, as onnxruntime reports them."""

    @property
    def passed(self) -> bool:
        """Whether all tokens are equal in all three comparisons."""
        return self.alone_equal == self.batch_equal == self.batch_equals_alone == self.prompts


def load_portable(
    bundle: Path,
    *,
    checkpoint: Path | None = None,
    root: Path | None = None,
    timeout: float = 1800.0,
) -> PortableReport:
    """Compare greedy tokens of a portable bundle in Optimum and of its checkpoint in PyTorch.

    Prompts of different lengths are continued one by one and in one left-padded batch, beyond the
    local window of neo-mini.

    Args:
        bundle: written by `neo-export --target portable`.
        checkpoint: folder of the checkpoint that it was exported from; None: the demo model.
        root: folder of the peers' environments.
        timeout: most seconds of the comparison.

    Raises:
        BundleError: `bundle` is not a bundle, or not a portable one.
        CheckpointError: `checkpoint` is not a checkpoint, or its shape is not that of the bundle.
        DependencyError: the environment of the peer optimum is not set up.
        NeoError: Optimum or PyTorch failed, or took too long.
    """
    manifest = _portable_manifest(bundle)
    checkpoint = checkpoint or DEMO
    check_checkpoint(checkpoint, manifest.model)
    new_tokens = min(_NEW_TOKENS, manifest.max_length - max(_LENGTHS))
    prompts = [context_ids(length, 1, length, manifest.model.vocab_size)[0] for length in _LENGTHS]
    request = json.dumps({"prompts": prompts, "new_tokens": new_tokens})
    command = [
        str(python_of("optimum", root)),
        str(_START),
        "worker_portable",
        "--bundle",
        str(bundle.resolve()),
        "--file-name",
        manifest.graphs["score"].file,
        "--checkpoint",
        str(checkpoint.resolve()),
    ]
    answer = _run(command, request, timeout)
    alone, batch = answer["alone"], answer["batch"]
    return PortableReport(
        prompts=len(prompts),
        new_tokens=new_tokens,
        alone_equal=_equal(alone["bundle"], alone["torch"]),
        batch_equal=_equal(batch["bundle"], batch["torch"]),
        batch_equals_alone=_equal(batch["bundle"], alone["torch"]),
        versions=answer["versions"],
        bundle_io=answer["bundle_io"],
    )


def _portable_manifest(bundle: Path) -> Manifest:
    path = bundle / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BundleError(
            f"{bundle} is not a bundle: cannot read {path} ({error.strerror}); "
            "write one with `neo-export MODEL -o BUNDLE --target portable`"
        ) from error
    manifest = Manifest.from_json(text, str(path))
    if manifest.target != "portable" or "score" not in manifest.graphs:
        raise BundleUnsupportedError(
            f"{bundle} was exported for {manifest.target!r}, but Optimum needs standard operators "
            "and the score graph; export it with `--target portable`"
        )
    return manifest


def _run(command: list[str], request: str, timeout: float) -> dict[str, Any]:
    try:
        done = subprocess.run(
            command,
            input=request,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=peer_environ(1),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise NeoError(
            f"Optimum and PyTorch did not finish in {timeout:.0f} s; choose a longer timeout"
        ) from error
    except OSError as error:
        raise DependencyError(
            f"the optimum environment does not start ({error}); "
            "run `python -m neo_tools.peers setup optimum` again"
        ) from error
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-15:])
        raise NeoError(f"Optimum could not run the bundle; its last lines:\n{tail}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _equal(one: list[list[int]], other: list[list[int]]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=True))
