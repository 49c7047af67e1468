"""Searches the scales and shifts of outlier migration, place by place, by measured error.

For each place that quantized matrices read, candidates are tried on sampled activations of the
calibration text and on the weights, both actually rounded. The candidate whose product is nearest
to the exact one wins:

- SmoothQuant's max|x|^α / max|w|^(1−α) for several α, and the same with root mean squares;
- the best of those, improved by gradient descent on the expected error. With one rounding step per
  row (or block) of x and of w, m = max|x/s| of a row and M = max|w·s| of an output:

      E(s) ∝ E[m²]/127² · Σ s²‖w‖²  +  Σ M²/L² · Σ E[x²]/s²          (L: largest weight integer)

Candidates are fitted to one half of the samples and judged on the other. A place is left unchanged
unless a candidate is clearly better: a model without outliers keeps its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_export.gpt_neo.parameters import LAYER_INPUTS, readers_of
from neo_export.quantize.int4 import dequantize_int4
from neo_export.quantize.int8 import LIMIT, dequantize_int8
from neo_export.quantize.migration import Migration
from neo_export.quantize.migration_descent import descended, normalized, positive
from neo_export.quantize.remembered import remembered_arrays

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from neo_runtime.bundle.manifest import ModelSpec
    from numpy.typing import NDArray

    from neo_export.statistics.folder import Statistics

__all__ = ["MovedPlace", "Rounding", "find_migration"]

Array = Any

_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_OUTPUTS = 384
"""Rows of the weights that candidates are tried on; evenly spaced."""
_SHIFTED = ("attended", "ln_2", "gelu")
"""Places whose readers have a bias, which can hold a constant part."""
_HARMLESS = 0.03
"""A place whose product has at most this relative error, ‖y − ŷ‖ / ‖y‖, is left unchanged. int8
without outliers has 0.6 to 2.5 % (the demo model), with outliers 6 % and more. Where the readers
have a bias, ‖y‖ is taken without the mean of y: a large constant that the bias may cancel must not
hide an error."""
_PROMISING, _CLEAR = 0.75, 0.5
"""A candidate's squared error, relative to that without rescaling, must be below the first to be
refined, and at most the second to be used. Without outliers it stays above 0.55 (the demo model),
and perplexity does not improve; with outliers it falls below 0.2."""


@dataclass(frozen=True)
class Rounding:
    """How a product's inputs and weights are rounded."""

    block_size: int | None
    """Inputs that share a scale (int4); None for one scale per row (int8)."""

    def activations(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """X [n, C], quantized to 8 bits and dequantized."""
        blocks = x.reshape(len(x), -1, self.block_size or x.shape[1])
        step = np.maximum(np.abs(blocks).max(axis=-1, keepdims=True), 1e-30) / np.float32(127)
        result: NDArray[np.float32] = (np.rint(blocks / step) * step).reshape(x.shape)
        return result

    def weights(self, w: NDArray[np.float32]) -> NDArray[np.float32]:
        """W [out, C], quantized as it is stored and dequantized."""
        if self.block_size is None:
            return dequantize_int8(w)
        return dequantize_int4(w, self.block_size)

    @property
    def weight_limit(self) -> int:
        """Largest integer of a weight."""
        return LIMIT if self.block_size is None else 8


@dataclass(frozen=True)
class MovedPlace:
    """A place that is rescaled, and its errors before and after."""

    place: str
    error_before: float
    """‖y − ŷ‖ / ‖y‖ of the product on sampled activations, without the rescaling; where the readers
    have a bias, ‖y‖ is taken without the mean of y."""
    error_after: float
    shifted: bool
    """Whether the constant part of its channels was moved into the bias, too."""


def find_migration(
    read: Callable[[str], NDArray[np.float32]],
    spec: ModelSpec,
    statistics: Statistics,
    rounding_of: Callable[[str], Rounding | None],
    progress: Callable[[int, int], None] | None = None,
    remembered: Path | None = None,
) -> tuple[Migration, tuple[MovedPlace, ...]]:
    """Choose the scales of every place.

    Args:
        read: returns a weight of the checkpoint by name, float32.
        spec: the architecture.
        statistics: those of this checkpoint.
        rounding_of: a matrix's name → how its product is rounded; None if it is not rounded.
        progress: called with the number of places done and the total.
        remembered: folder that caches the results for these statistics between exports.
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
            found = remembered_arrays(
                remembered,
                _file_name(place, names, rounding),
                partial(_search, place, names, read, statistics, rounding),
            )
            if found:
                scales[place] = found["scale"]
                if "shift" in found:
                    shifts[place] = found["shift"]
                before, after = found["errors"].tolist()
                moved.append(MovedPlace(place, before, after, "shift" in found))
        if progress is not None:
            progress(done, len(places))
    return Migration(scales, shifts), tuple(moved)


def _file_name(place: str, names: list[str], rounding: Rounding) -> str:
    """A file name with all that a search depends on besides the checkpoint and its statistics."""
    readers = "+".join(name.split(".")[-2] for name in names)
    steps = f"{rounding.block_size or 'row'}-{rounding.weight_limit}"
    return f"{place}.rescaled.{steps}.{readers}"


@dataclass(frozen=True)
class _Place:
    """Data of a place and its readers for one candidate of z, which is already subtracted."""

    shift: NDArray[np.float32] | None
    fit: NDArray[np.float32]
    """[n, C]: samples that candidates are fitted to."""
    judge: NDArray[np.float32]
    """[n, C]: samples that candidates are judged on."""
    exact: NDArray[np.float32]
    """[n, rows]: exact products of `judge` with the sampled rows of the weights."""
    largest: tuple[Array, Array]
    """Largest |x − z| and |w| of each channel."""
    typical: tuple[Array, Array]
    """Root mean square of x − z and of w."""


def _search(
    place: str,
    names: list[str],
    read: Callable[[str], NDArray[np.float32]],
    statistics: Statistics,
    rounding: Rounding,
) -> dict[str, NDArray[Any]]:
    """Scale, shift (if any), errors before and after; empty if the place stays unchanged."""
    weights = np.concatenate([read(name) for name in names])
    rows = np.linspace(0, len(weights) - 1, min(_OUTPUTS, len(weights))).astype(np.int64)
    some = np.ascontiguousarray(weights[rows])

    def error(view: _Place, scale: NDArray[np.float32]) -> float:
        rounded = rounding.activations(view.judge / scale) @ rounding.weights(some * scale).T
        return float(np.linalg.norm(rounded - view.exact))

    plain = _view(place, weights, some, statistics, None)
    before = error(plain, np.ones(some.shape[1], np.float32))
    constant = some @ statistics.channel_mean(place) if _kind(place) in _SHIFTED else 0
    size = max(float(np.linalg.norm(plain.exact - constant)), 1e-30)
    if before <= _HARMLESS * size:
        return {}
    best, scale, view = before, None, plain
    for z in _shifts(place, statistics):
        shifted = plain if z is None else _view(place, weights, some, statistics, z)
        for candidate in _candidates(shifted):
            found = error(shifted, candidate)
            if found < best:
                best, scale, view = found, candidate, shifted
    if scale is None or best * best > _PROMISING * before * before:
        return {}
    block = rounding.block_size or some.shape[1]
    candidate = descended(view.fit, some, scale, block, rounding.weight_limit)
    if (found := error(view, candidate)) < best:
        best, scale = found, candidate
    if best * best > _CLEAR * before * before:
        return {}
    moved = {"scale": scale, "errors": np.array([before / size, best / size])}
    return moved if view.shift is None else moved | {"shift": view.shift}


def _kind(place: str) -> str:
    return place.rsplit(".", 1)[1]


def _shifts(place: str, statistics: Statistics) -> Iterator[NDArray[np.float32] | None]:
    """Candidates for z: none, the mean, and the middle of the range (OS+)."""
    yield None
    if _kind(place) in _SHIFTED:
        low, high = statistics.channel_range(place)
        yield statistics.channel_mean(place)
        yield np.float32(0.5) * (low + high)


def _view(
    place: str,
    weights: NDArray[np.float32],
    some: NDArray[np.float32],
    statistics: Statistics,
    shift: NDArray[np.float32] | None,
) -> _Place:
    z = np.float32(0) if shift is None else shift
    sample = statistics.sample(place) - z
    low, high = statistics.channel_range(place)
    mean = statistics.channel_mean(place)
    square = statistics.channel_mean_square(place) - 2 * z * mean + z * z
    judge = np.ascontiguousarray(sample[1::2])
    w_square = np.einsum("ij,ij->j", weights, weights) / len(weights)
    return _Place(
        shift=shift,
        fit=np.ascontiguousarray(sample[0::2]),
        judge=judge,
        exact=judge @ some.T,
        largest=(np.maximum(high - z, z - low), np.abs(weights).max(axis=0)),
        typical=(np.sqrt(np.maximum(square, 0)), np.sqrt(w_square)),
    )


def _candidates(view: _Place) -> Iterator[NDArray[np.float32]]:
    yield np.ones(view.fit.shape[1], np.float32)
    for x, w in (view.largest, view.typical):
        for alpha in _ALPHAS:
            yield normalized(positive(x) ** alpha / positive(w) ** (1 - alpha))
