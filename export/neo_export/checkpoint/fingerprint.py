"""Identifies a checkpoint: a digest of every tensor, and one over all of them."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from neo_runtime.machine.cores import usable_processors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from neo_export.checkpoint.lazy_tensor import LazyTensor
    from neo_export.checkpoint.whole import Checkpoint

__all__ = ["checkpoint_fingerprint", "fingerprint", "tensor_digests"]

_CHUNK = 1 << 24


def tensor_digests(
    checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None
) -> dict[str, str]:
    """sha256 (hex) of every tensor's type, shape and bytes, by name; reads the whole checkpoint.

    Args:
        checkpoint: an open checkpoint.
        progress: called with the number of tensors done and the total.
    """
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(usable_processors()) as pool:  # hashing releases the GIL
        for name, digest in zip(
            checkpoint.tensors, pool.map(_digest, checkpoint.tensors.values()), strict=True
        ):
            digests[name] = digest
            if progress is not None:
                progress(len(digests), len(checkpoint.tensors))
    return digests


def fingerprint(digests: Mapping[str, str]) -> str:
    """One sha256 (hex) over the names and digests of all tensors."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def checkpoint_fingerprint(
    checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None
) -> str:
    """`fingerprint` of `tensor_digests`."""
    return fingerprint(tensor_digests(checkpoint, progress))


def _digest(tensor: LazyTensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    flat = np.ascontiguousarray(tensor.read_raw()).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _CHUNK):
        digest.update(flat[start : start + _CHUNK].data)
    return digest.hexdigest()
