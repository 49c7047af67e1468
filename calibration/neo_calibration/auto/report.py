"""What a search found: one JSON file, and the picture of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from neo_calibration.auto.picture import to_svg

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from neo_export.quantize.plan import Storage

    from neo_calibration.auto.judge import Measured
    from neo_calibration.auto.sensitivity import Group

__all__ = ["Point", "point_of", "write_report"]


@dataclass(frozen=True)
class Point:
    """One bundle on the trade-off curve."""

    name: str
    kind: str
    """"auto", "calibrated" (all alike), "rounded" (all alike), or "float32"."""
    size: int
    """Bytes of weights.bin."""
    divergence: float
    interval: tuple[float, float] | None


def point_of(name: str, kind: str, measured: Measured) -> Point:
    """The point of a bundle that was measured."""
    return Point(name, kind, measured.size, measured.divergence, measured.interval)


def write_report(
    folder: Path,
    *,
    model: str,
    facts: Mapping[str, Any],
    divergences: Mapping[tuple[Group, Storage], float],
    points: Sequence[Point],
) -> None:
    """Write `auto.json` and, where there are points, `auto.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    sensitivities = [
        {"weights": list(group.names), "storage": str(storage), "divergence": divergence}
        for (group, storage), divergence in divergences.items()
    ]
    raw = {
        "schema_version": 1,
        "model": model,
        **facts,
        "points": [asdict(point) for point in points],
        "sensitivities": sensitivities,
    }
    (folder / "auto.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    if any(point.kind == "auto" for point in points):
        (folder / "auto.svg").write_text(to_svg(points, model), encoding="utf-8")
