"""How many sequences have room, where nobody says how many are to be computed together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_runtime.bundle.manifest import WEIGHTS_NAME
from neo_runtime.machine.memory import available_memory

if TYPE_CHECKING:
    from neo_runtime.cached_model import CachedModel

__all__ = ["fitting_batch", "memory_for_caches"]

_ACTIVATIONS = 128 * 2**20
"""Bytes that a chunk of a prompt may take beside weights and caches."""


def fitting_batch(
    model: CachedModel, most: int, length: int, *, each: int = 1, spare: int = 0
) -> int:
    """`most`, halved until caches of so many have room; at least 1.

    Room is what `max_cache_bytes` leaves, and on a CPU `memory_for_caches`.

    Args:
        model: whose caches.
        most: prompts at once.
        length: positions of a sequence.
        each: sequences of a prompt.
        spare: more sequences that shall have room, too.
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

    The weights, which are mapped from a file, count as taken, whether or not they are in memory
    now: without them every step would read them from the disk.

    Returns:
        None where nothing is known, and for a model on a GPU.
    """
    free = available_memory() if model.backend == "cpu" else None
    if free is None:
        return None
    weights = model.manifest.files[WEIGHTS_NAME].size
    return max(0, free - weights - min(_ACTIVATIONS, free // 8))
