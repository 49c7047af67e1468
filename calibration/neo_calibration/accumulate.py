"""Accumulates one place's statistics, a context at a time, in constant memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from neo_export.statistics.header import PlaceStatistics
from neo_runtime.errors import StatisticsError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["OUTLIER_RATIO", "PERCENTILES", "Accumulator", "PlaceResult"]

PERCENTILES = (50.0, 90.0, 99.0, 99.9, 99.99, 99.999)
OUTLIER_RATIO = 6.0
"""A channel is an outlier if its largest |x| is this many times that of the median channel."""

_SHIFT = 17
"""float32 bits that the histogram drops; the exponent and 6 bits of the mantissa remain."""
_BINS = 1 << (31 - _SHIFT)
_BLOCK = 1024
_ROWS = 512


@dataclass(frozen=True)
class PlaceResult:
    """The results of a place: the entries for the JSON, and the arrays."""

    place: str
    summary: PlaceStatistics
    arrays: dict[str, NDArray[np.float32] | NDArray[np.int32]]
    """Arrays by "PLACE.KIND"."""


class Accumulator:
    """Accumulates values [n, C] of one place.

    Ranges are exact. Means and mean squares are summed in float64. Percentiles of |x| come from a
    histogram of all values, with 64 bins per octave (the leading 15 bits of the float32), read at
    the middle of a bin: their error is at most 2⁻⁷ (0.8 %). Second moments are summed in float32, a
    context at a time, the lower triangle only.
    """

    def __init__(self, place: str, channels: int, *, inputs: bool, second_moment: bool) -> None:
        """Start without values.

        Args:
            place: the place's name, for errors.
            channels: C.
            inputs: whether a matrix reads this place; then sampled values are kept.
            second_moment: whether to keep E[x xᵀ].
        """
        import torch

        self._torch: Any = torch
        self.place = place
        self._count = 0
        self._low = torch.full((channels,), np.inf)
        self._high = torch.full((channels,), -np.inf)
        self._sum = torch.zeros(channels, dtype=torch.float64)
        self._square = torch.zeros(channels, dtype=torch.float64)
        self._histogram = torch.zeros(_BINS, dtype=torch.int64)
        self._moment: Any = torch.zeros(channels, channels) if second_moment else None
        self._samples: list[Any] | None = [] if inputs else None

    def add(self, values: Any, sampled: NDArray[np.int64]) -> None:
        """Add a torch tensor [n, C], float32; `sampled` are its rows to keep.

        Raises:
            StatisticsError: a value is NaN or infinite.
        """
        torch = self._torch
        values = values.contiguous()
        low, high = values.amin(0), values.amax(0)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise StatisticsError(
                f"{self.place} has values that are NaN or infinite, in float32 and on this text; "
                "the checkpoint is damaged or its training diverged: use another one"
            )
        self._count += len(values)
        self._low = torch.minimum(self._low, low)
        self._high = torch.maximum(self._high, high)
        for start in range(0, len(values), _ROWS):
            rows = values[start : start + _ROWS]
            self._sum += rows.sum(0, dtype=torch.float64)
            self._square += (rows * rows).sum(0, dtype=torch.float64)
            bits = (rows.view(torch.int32) & 0x7FFFFFFF) >> _SHIFT
            self._histogram += torch.bincount(bits.reshape(-1), minlength=_BINS)
        if self._moment is not None:
            for start in range(0, values.shape[1], _BLOCK):
                stop = min(start + _BLOCK, values.shape[1])
                self._moment[start:stop, :stop] += values[:, start:stop].T @ values[:, :stop]
        if self._samples is not None and len(sampled):
            self._samples.append(values[torch.from_numpy(sampled)])

    def finish(self, file: str) -> PlaceResult:
        """Return the result; the accumulator cannot be used afterwards.

        Args:
            file: name of the safetensors file that will hold the arrays.
        """
        low, high = self._low.numpy(), self._high.numpy()
        largest = np.maximum(-low, high)
        square = self._square.numpy() / self._count
        arrays = {
            "low": low,
            "high": high,
            "mean": (self._sum.numpy() / self._count).astype(np.float32),
            "mean_square": square.astype(np.float32),
        }
        if self._samples is not None:
            arrays["sample"] = self._torch.cat(self._samples).numpy()
        if self._moment is not None:
            arrays["second_moment"] = self._symmetric()
        summary = PlaceStatistics(
            channels=len(low),
            low=float(low.min()),
            high=float(high.max()),
            mean_square=float(square.mean()),
            percentiles=self._percentiles(),
            outlier_channels=tuple(
                int(c) for c in np.flatnonzero(largest >= OUTLIER_RATIO * np.median(largest))
            )
            if largest.any()
            else (),
            file=file,
            second_moment=self._moment is not None,
        )
        self._moment = None
        return PlaceResult(
            self.place, summary, {f"{self.place}.{kind}": a for kind, a in arrays.items()}
        )

    def _percentiles(self) -> dict[str, float]:
        cumulative = self._histogram.cumsum(0).numpy()
        total = int(cumulative[-1])
        found = {}
        for percent in PERCENTILES:
            index = int(np.searchsorted(cumulative, percent / 100 * total))
            middle = np.array([(index << _SHIFT) + (1 << (_SHIFT - 1))], np.uint32)
            value = float(middle.view(np.float32)[0]) if index else 0.0
            found[f"{percent:g}"] = value
        return found

    def _symmetric(self) -> NDArray[np.float32]:
        """Divide by the count, and copy the lower triangle to the upper one, in place."""
        moment: NDArray[np.float32] = self._moment.numpy()
        moment /= np.float32(self._count)
        for start in range(0, len(moment), _BLOCK):
            stop = min(start + _BLOCK, len(moment))
            block = moment[start:stop, start:stop]
            lower = np.tril(block, -1)
            block[...] = lower + lower.T + np.diag(np.diag(block))
            moment[:start, start:stop] = moment[start:stop, :start].T
        return moment
