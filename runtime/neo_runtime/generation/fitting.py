"""The default batch size: how many sequences fit into memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_runtime.bundle.manifest import WEIGHTS_NAME
from neo_runtime.machine.memory import available_memory

if TYPE_CHECKING:
    from neo_runtime.cached_model import CachedModel

__all__ = ["fitting_batch", "memory_for_caches"]

_ACTIVATIONS = 128 * 2**20
"""Bytes to leave for the activations of a chunk of a prompt, beside weights and caches."""


def fitting_batch(
    model: CachedModel, most: int, length: int, *, each: int = 1, spare: int = 0
) -> int:
    """`most`, halved until the caches of that many prompts fit; at least 1.

    The limits are what `max_cache_bytes` leaves, and on a CPU `memory_for_caches`.

    Args:
        model: allocates the caches.
        most: most prompts at once.
        length: positions of a sequence.
        each: sequences per prompt.
        spare: number of additional sequences to leave room for.
    """
    limits = [model.cache_bytes_left, memory_for_caches(model)]
    known = [limit for limit in limits if limit is not None]
    if known:
        room = min(known) - model.cache_bytes(spare, length)
        while most > 1 and model.cache_bytes(most * each, length) > room:
            most //= 2
    return most


def memory_for_caches(model: CachedModel) -> int | None:
    """Bytes of the machine's or the container's memory that caches may still take.

    The memory-mapped weights count as taken, whether or not they are in memory now: if they did not
    fit, every step would read them from disk.

    Returns:
        None if the available memory is not known, and for a model on a GPU.
    """
    free = available_memory() if model.backend == "cpu" else None
    if free is None:
        return None
    weights = model.manifest.files[WEIGHTS_NAME].size
    return max(0, free - weights - min(_ACTIVATIONS, free // 8))
