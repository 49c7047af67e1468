"""int8 keys and values: the quantization step of each channel, from calibration statistics.

A channel of a layer's keys (or values) is stored as round(x / step), −128 … 127, ties to even, with
the same step at every position. Steps are static, because the cache is written once and read by
every later token: they come from statistics over real text, never from the current position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from neo_runtime.errors import RequestError, StatisticsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_runtime.bundle.manifest import CacheSpec, ModelSpec
    from numpy.typing import NDArray

    from neo_export.statistics.folder import Statistics

__all__ = [
    "CACHE_FORMATS",
    "CACHE_LEVELS",
    "HEADROOM",
    "CacheSteps",
    "calibrated_steps",
    "check_int8_cache",
    "steps_from_ranges",
    "stored_cache",
]

CACHE_FORMATS = ("float", "int8")
"""`float` is the type of the activations."""

CACHE_LEVELS = 127
"""Number of steps from zero to the largest value that can be stored."""
HEADROOM = 1.5
"""The largest value that can be stored, as a multiple of the largest that calibration saw. Finer
steps gain nothing, and clipped values cost much. Perplexity of neo-mini with float32 weights,
relative to 11.0997 with the float cache, by number of calibration tokens:

    headroom      0.6      0.8      1.0      1.25     1.5      2.0
    64 tokens                      +1.70 %  +0.15 %  +0.01 %  +0.00 %
    256 tokens                     +0.22 %  +0.05 %  +0.02 %  +0.01 %
    8192 tokens  +2.61 %  -0.00 %  +0.02 %  -0.01 %  -0.01 %
"""

_HEAD_SIZE_MULTIPLE = 8
_EVICTED_HEAD_SIZE_MULTIPLE = 16
"""onnxruntime's attention needs such head sizes for an int8 cache that it evicts positions from."""


@dataclass(frozen=True)
class CacheSteps:
    """The quantization step of each layer and channel."""

    key: tuple[NDArray[np.float32], ...]
    """One array per layer, float32 [hidden], all above 0."""
    value: tuple[NDArray[np.float32], ...]
    """The same for values."""


_NOTHING = 1e-30
"""Below this, float32 may not hold a range's step or its reciprocal."""


def steps_from_ranges(
    channel_max: Callable[[str], NDArray[np.float32]], spec: ModelSpec
) -> CacheSteps:
    """The step of each channel: `HEADROOM` times its largest value, divided by `CACHE_LEVELS`.

    Args:
        channel_max: returns the largest |x| of each channel of a place, [hidden], such as
            `Statistics.channel_max` of this very model.
        spec: the model.

    Raises:
        StatisticsError: a range is not finite, or has another width than the model.
    """

    def steps(layer: int, place: str) -> NDArray[np.float32]:
        name = f"transformer.h.{layer}.{place}"
        largest = np.asarray(channel_max(name), dtype=np.float32)
        if largest.shape != (spec.hidden_size,):
            raise StatisticsError(
                f"the statistics of {name} have shape {list(largest.shape)}, expected "
                f"[{spec.hidden_size}]: they are for another model; run neo-calibrate on this one"
            )
        if not (np.isfinite(largest).all() and (largest >= 0).all()):
            raise StatisticsError(
                f"the statistics of {name} hold a range that is negative or not finite; "
                "run neo-calibrate again"
            )
        # A channel that is always (almost) 0 has weights of that size, and any step will do.
        used = np.where(largest > _NOTHING, largest, 1)
        return (used * np.float32(HEADROOM / CACHE_LEVELS)).astype(np.float32)

    layers = range(spec.num_layers)
    return CacheSteps(
        key=tuple(steps(layer, "key") for layer in layers),
        value=tuple(steps(layer, "value") for layer in layers),
    )


def check_int8_cache(cache: CacheSpec, spec: ModelSpec) -> None:
    """Refuse an int8 cache where it is not supported.

    Args:
        cache: how the target keeps keys and values without it.
        spec: the model.

    Raises:
        RequestError: this target, precision or model has no int8 cache.
    """
    if cache.dtype != "float32":
        raise RequestError(
            f"--kv-cache int8 needs float32 activations, these are {cache.dtype}; "
            "use it with --fp32, --int8, --int4 or --plan"
        )
    if cache.layout != "in_place":
        raise RequestError(
            "--kv-cache int8 needs attention that reads int8: target cpu, a head size that is a "
            f"multiple of {_HEAD_SIZE_MULTIPLE}; this model's head size is {spec.head_dim}; omit it"
        )
    evicts = cache.window is not None and "local" in spec.attention_layers
    if evicts and spec.head_dim % _EVICTED_HEAD_SIZE_MULTIPLE:
        raise RequestError(
            f"--kv-cache int8 needs head sizes that are multiples of "
            f"{_EVICTED_HEAD_SIZE_MULTIPLE} if a model has local layers, this one's head size is "
            f"{spec.head_dim}; leave it out"
        )


def calibrated_steps(statistics: Statistics | None, spec: ModelSpec) -> CacheSteps:
    """The steps of an int8 cache.

    Args:
        statistics: those of this very model; None if there was no calibration.
        spec: the model.

    Raises:
        RequestError: there is no calibration.
        StatisticsError: the statistics are damaged.
    """
    if statistics is None:
        raise RequestError(
            "--kv-cache int8 needs the ranges of keys and values: run neo-calibrate "
            "MODEL --text FILE -o STATS, then add --calibration STATS"
        )
    return steps_from_ranges(statistics.channel_max, spec)


def stored_cache(x: NDArray[np.float32], step: NDArray[np.float32]) -> NDArray[np.float32]:
    """Keys or values, rounded to int8 and dequantized: float32, the shape of `x`.

    Args:
        x: float32 [..., hidden].
        step: float32 [hidden].
    """
    integers = np.clip(np.rint(x * (np.float32(1) / step)), -CACHE_LEVELS - 1, CACHE_LEVELS)
    result: NDArray[np.float32] = (integers * step).astype(np.float32)
    return result
