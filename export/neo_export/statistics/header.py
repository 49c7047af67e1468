"""`statistics.json`: the model, the text and the places of a folder of statistics.

The format is described in docs/design/statistics.md.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from neo_runtime.errors import StatisticsError
from neo_runtime.json_input import parse_json

from neo_export.gpt_neo.parameters import LAYER_INPUTS

__all__ = [
    "FEWEST_POSITIONS",
    "INPUT_PLACES",
    "MEASURED_PLACES",
    "SCHEMA_VERSION",
    "STATISTICS_NAME",
    "PlaceStatistics",
    "StatisticsHeader",
]

STATISTICS_NAME = "statistics.json"
SCHEMA_VERSION = 1
FEWEST_POSITIONS = 2
"""Least number of positions: one to choose by, one to judge the choice by."""

MEASURED_PLACES = (
    "ln_1",
    "query",
    "key",
    "value",
    "attended",
    "attention",
    "ln_2",
    "c_fc",
    "gelu",
    "mlp",
    "residual",
)
"""Places of a layer, in the order of computation."""

INPUT_PLACES = (*LAYER_INPUTS, "final_norm")
"""Places that a matrix reads: they have second moments and samples."""


@dataclass(frozen=True, kw_only=True)
class PlaceStatistics:
    """The entry of one place in `statistics.json`."""

    channels: int
    low: float
    """Smallest value seen."""
    high: float
    """Largest value seen."""
    mean_square: float
    percentiles: dict[str, float]
    """Percentiles of |x| over all values: "50", "90", "99", "99.9", "99.99", "99.999"; the error of
    each is at most 0.8 %, see docs/design/statistics.md."""
    outlier_channels: tuple[int, ...]
    """Channels whose largest |x| is at least 6 times the median channel's."""
    file: str
    """The safetensors file with the arrays."""
    second_moment: bool
    """Whether the full matrix of second moments was kept."""

    @property
    def largest(self) -> float:
        """The largest |x| seen."""
        return max(-self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class StatisticsHeader:
    """`statistics.json`."""

    schema_version: int
    model: dict[str, Any]
    """`spec`: the architecture, as a bundle's manifest has it; `tensors`: name → sha256."""
    text: dict[str, Any]
    """`digest`: sha256 of the token ids; `tokens`, `contexts`, `max_length`, `files`."""
    places: dict[str, PlaceStatistics]
    """Places in the order of computation."""
    score_max: dict[str, tuple[float, ...]]
    """Layer ("transformer.h.0") → largest |q·k|, unscaled and causal, of each head."""
    tools: dict[str, str]
    """Versions of the packages that ran the model."""

    def to_json(self) -> str:
        """JSON text with a newline at its end; the same content has the same bytes."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = STATISTICS_NAME) -> Self:
        """Parse and check.

        Raises:
            StatisticsError: the text is not from `to_json`, or has a newer schema.
        """
        try:
            raw = parse_json(text)
            version = raw["schema_version"]
            if version != SCHEMA_VERSION:
                raise StatisticsError(
                    f"{source} has schema version {version}, expected {SCHEMA_VERSION}; run "
                    "this version's neo-calibrate again"
                )
            raw["places"] = {
                name: PlaceStatistics(
                    **(place | {"outlier_channels": tuple(place["outlier_channels"])})
                )
                for name, place in raw["places"].items()
            }
            if raw["text"]["tokens"] < FEWEST_POSITIONS:
                raise StatisticsError(
                    f"{source} covers {raw['text']['tokens']} token, expected at least "
                    f"{FEWEST_POSITIONS} and preferably thousands; run neo-calibrate on more text"
                )
            raw["score_max"] = {name: tuple(heads) for name, heads in raw["score_max"].items()}
            return cls(**raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StatisticsError(
                f"{source} is damaged ({error!r}); run neo-calibrate again"
            ) from error
