"""Which channels to rescale, and by how much: chosen by measured error, place by place.

For each place that quantized matrices read, candidates are tried on sampled activations of the
calibration text and on the weights, both really rounded, and the one whose product is nearest to
the exact one wins:

- SmoothQuant's max|x|^α / max|w|^(1−α) for several α, and the same with root mean squares;
- from the best of those down to a minimum of the expected error. For one rounding step a row (or
  block) of x and of w, with m = max|x/s| of a row and M = max|w·s| of an output,

      E(s) ∝ E[m²]/127² · Σ s²‖w‖²  +  Σ M²/L² · Σ E[x²]/s²          (L: largest weight integer)

Candidates are fitted to one half of the samples and judged on the other, and a place is left alone
unless a candidate is clearly better: a model without outliers keeps its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_export.gpt_neo.parameters import LAYER_INPUTS, readers_of
from neo_export.quantize.int4 import dequantize_int4
from neo_export.quantize.int8 import dequantize_int8
from neo_export.quantize.migration import Migration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from neo_runtime.bundle.manifest import ModelSpec
    from numpy.typing import NDArray

    from neo_export.statistics.folder import Statistics

__all__ = ["MovedPlace", "Rounding", "find_migration"]

Array = Any

_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_OUTPUTS = 384
"""Rows of the weights that are tried; spread evenly."""
_STEPS = 40
_NORM = 16
"""A power mean of this order stands for the maximum, so that it has a slope."""
_SHIFTED = ("attended", "ln_2", "gelu")
"""Places whose readers have a bias, which can hold a constant part."""
_HARMLESS = 0.03
"""A product that is within this of the exact one (‖y − ŷ‖ / ‖y‖) needs nothing. int8 without
outliers is 0.6 to 2.5 % off (the demo model), and with them 6 % and more."""
_PROMISING, _CLEAR = 0.75, 0.5
"""A candidate's squared error, as a part of what it is without, must be below the first to be
refined, and below the second to be used. Without outliers it stays above 0.55 (the demo model),
and perplexity does not gain; with them it falls below 0.2."""


@dataclass(frozen=True)
class Rounding:
    """How a product is computed."""

    block_size: int | None
    """Inputs that share a scale: int4; None where a whole row does: int8."""

    def activations(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """X [n, C] in 8 bits, read back."""
        blocks = x.reshape(len(x), -1, self.block_size or x.shape[1])
        step = np.maximum(np.abs(blocks).max(axis=-1, keepdims=True), 1e-30) / np.float32(127)
        result: NDArray[np.float32] = (np.rint(blocks / step) * step).reshape(x.shape)
        return result

    def weights(self, w: NDArray[np.float32]) -> NDArray[np.float32]:
        """W [out, C] as stored, read back."""
        if self.block_size is None:
            return dequantize_int8(w)
        return dequantize_int4(w, self.block_size)

    @property
    def weight_limit(self) -> int:
        """Largest integer of a weight."""
        return 63 if self.block_size is None else 8


@dataclass(frozen=True)
class MovedPlace:
    """A place that is rescaled, and what it gains."""

    place: str
    error_before: float
    """‖y − ŷ‖ / ‖y‖ of the product, on sampled activations, without the rescaling."""
    error_after: float
    shifted: bool
    """Whether its channels' constant part went into the bias as well."""


def find_migration(
    read: Callable[[str], NDArray[np.float32]],
    spec: ModelSpec,
    statistics: Statistics,
    rounding_of: Callable[[str], Rounding | None],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Migration, tuple[MovedPlace, ...]]:
    """Choose the scales of every place.

    Args:
        read: gives a weight of the checkpoint by name, float32.
        spec: the architecture.
        statistics: of this checkpoint.
        rounding_of: a matrix's name → how its product is rounded; None where it is not.
        progress: called with places done and in all.
    """
    scales: dict[str, NDArray[np.float32]] = {}
    shifts: dict[str, NDArray[np.float32]] = {}
    moved = []
    layers = [f"transformer.h.{layer}" for layer in range(spec.num_layers)]
    places = [f"{layer}.{kind}" for layer in layers for kind in LAYER_INPUTS]
    for done, place in enumerate(places, start=1):
        roundings = {name: rounding_of(name) for name in readers_of(place)}
        names = [name for name, rounding in roundings.items() if rounding is not None]
        if names:
            rounding = roundings[names[0]]
            assert rounding is not None
            weights = np.concatenate([read(name) for name in names])
            found = _search(place, weights, statistics, rounding)
            if found is not None:
                scales[place], shift, result = found
                moved.append(result)
                if shift is not None:
                    shifts[place] = shift
        if progress is not None:
            progress(done, len(places))
    return Migration(scales, shifts), tuple(moved)


@dataclass(frozen=True)
class _Place:
    """What is known about a place and its readers, shifted by one candidate of z."""

    shift: NDArray[np.float32] | None
    fit: NDArray[np.float32]
    """[n, C]: samples that candidates are made from."""
    judge: NDArray[np.float32]
    """[n, C]: samples that they are tried on."""
    largest: tuple[Array, Array]
    """Largest |x − z| and |w| of each channel."""
    typical: tuple[Array, Array]
    """Root mean square of x − z and of w."""


def _search(
    place: str, weights: NDArray[np.float32], statistics: Statistics, rounding: Rounding
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, MovedPlace] | None:
    """Scale, shift and gain; None where the place stays as it is."""
    rows = np.linspace(0, len(weights) - 1, min(_OUTPUTS, len(weights))).astype(np.int64)
    some = np.ascontiguousarray(weights[rows])

    def error(view: _Place, scale: NDArray[np.float32]) -> float:
        rounded = rounding.activations(view.judge / scale) @ rounding.weights(some * scale).T
        return float(np.linalg.norm(rounded - view.judge @ some.T))

    plain = _view(place, weights, statistics, None)
    before = error(plain, np.ones(some.shape[1], np.float32))
    size = float(np.linalg.norm(plain.judge @ some.T))
    if before <= _HARMLESS * size:
        return None
    best, scale, shift = before, None, None
    for z in _shifts(place, statistics):
        view = _view(place, weights, statistics, z)
        for candidate in _candidates(view):
            found = error(view, candidate)
            if found < best:
                best, scale, shift = found, candidate, z
    if scale is None or best * best > _PROMISING * before * before:
        return None
    view = _view(place, weights, statistics, shift)
    candidate = _descend(view.fit, some, scale, rounding)
    if (found := error(view, candidate)) < best:
        best, scale = found, candidate
    if best * best > _CLEAR * before * before:
        return None
    return scale, shift, MovedPlace(place, before / size, best / size, shift is not None)


def _kind(place: str) -> str:
    return place.rsplit(".", 1)[1]


def _shifts(place: str, statistics: Statistics) -> Iterator[NDArray[np.float32] | None]:
    """Candidates of z: none, the mean, and (OS+) the middle of the range."""
    yield None
    if _kind(place) in _SHIFTED:
        low, high = statistics.channel_range(place)
        yield statistics.channel_mean(place)
        yield np.float32(0.5) * (low + high)


def _view(
    place: str,
    weights: NDArray[np.float32],
    statistics: Statistics,
    shift: NDArray[np.float32] | None,
) -> _Place:
    z = np.float32(0) if shift is None else shift
    sample = statistics.sample(place) - z
    low, high = statistics.channel_range(place)
    mean = statistics.channel_mean(place)
    square = statistics.channel_mean_square(place) - 2 * z * mean + z * z
    w_square = np.einsum("ij,ij->j", weights, weights) / len(weights)
    return _Place(
        shift=shift,
        fit=np.ascontiguousarray(sample[0::2]),
        judge=np.ascontiguousarray(sample[1::2]),
        largest=(np.maximum(high - z, z - low), np.abs(weights).max(axis=0)),
        typical=(np.sqrt(np.maximum(square, 0)), np.sqrt(w_square)),
    )


def _candidates(view: _Place) -> Iterator[NDArray[np.float32]]:
    yield np.ones(view.fit.shape[1], np.float32)
    for x, w in (view.largest, view.typical):
        for alpha in _ALPHAS:
            yield _normalized(_positive(x) ** alpha / _positive(w) ** (1 - alpha))


def _descend(
    x: NDArray[np.float32], w: NDArray[np.float32], start: Array, rounding: Rounding
) -> NDArray[np.float32]:
    """Minimize E(s) over log s; x [n, C], w [out, C]."""
    block = rounding.block_size or x.shape[1]
    x_blocks = np.abs(x).reshape(len(x), -1, block)
    w_blocks = np.abs(w).reshape(len(w), -1, block)
    x_power = (x_blocks.astype(np.float64) ** 2).mean(axis=0)
    w_power = (w_blocks.astype(np.float64) ** 2).sum(axis=0)
    log = np.log(_positive(start)).reshape(-1, block)
    best, least = log, np.inf
    for step in range(_STEPS):
        scale = np.exp(log).astype(np.float32)
        x_max, x_share = _soft_max(x_blocks / scale)
        w_max, w_share = _soft_max(w_blocks * scale)
        w_energy, x_energy = w_power * scale**2, x_power / scale**2
        of_x = x_max.mean(axis=0) * w_energy.sum(axis=-1) / 127**2
        of_w = w_max.sum(axis=0) * x_energy.sum(axis=-1) / rounding.weight_limit**2
        total = float(np.sum(of_x + of_w))
        if total < least:
            best, least = log, total
        slope_x = _portion(w_energy) - _weighted(x_share, x_max)
        slope_w = _weighted(w_share, w_max) - _portion(x_energy)
        slope = of_x[:, None] * slope_x + of_w[:, None] * slope_w
        rate = (0.5 if step < _STEPS // 2 else 0.15) / max(float(np.abs(slope).max()), 1e-30)
        log = log - rate * slope
    return _normalized(np.exp(best).reshape(-1))


def _soft_max(values: NDArray[np.float32]) -> tuple[Array, Array]:
    """Square of the maximum along the last axis [n, blocks], and each entry's part in it."""
    top = np.maximum(values.max(axis=-1, keepdims=True), 1e-30)
    power = values / top
    for _ in range(_NORM.bit_length() - 1):
        power *= power
    total = np.maximum(power.sum(axis=-1, keepdims=True), 1e-30)
    largest = (top * total ** np.float32(1 / _NORM))[..., 0].astype(np.float64)
    return largest**2, power / total


def _portion(energy: Array) -> Array:
    return energy / np.maximum(energy.sum(axis=-1, keepdims=True), 1e-30)


def _weighted(share: Array, largest: Array) -> Array:
    """Mean of [n, blocks, size] over n, with the weights [n, blocks]."""
    total = np.einsum("nbc,nb->bc", share, largest.astype(np.float32))
    return total / np.maximum(largest.sum(axis=0), 1e-30)[:, None]


def _positive(values: Array) -> Array:
    """Never zero: a silent channel counts as the smallest of the others."""
    values = np.asarray(values, np.float64)
    floor = values[values > 0].min() if (values > 0).any() else 1.0
    return np.maximum(values, max(floor, 1e-5 * values.max()))


def _normalized(scale: Array) -> NDArray[np.float32]:
    """Geometric mean 1: only ratios matter."""
    result: NDArray[np.float32] = (scale / np.exp(np.log(scale).mean())).astype(np.float32)
    return result
