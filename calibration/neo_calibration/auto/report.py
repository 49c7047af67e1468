"""The report of a search: the plan, one JSON file, and a chart."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_export.files.text_file import write_text_file
from neo_runtime.errors import OutputError

from neo_calibration.auto.picture import to_svg

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from neo_export.quantize.plan import Storage, WeightPlan

    from neo_calibration.auto.curve import Point
    from neo_calibration.auto.sensitivity import Group

__all__ = ["write_report"]


def write_report(
    folder: Path,
    *,
    model: str,
    plan: WeightPlan,
    facts: Mapping[str, Any],
    divergences: Mapping[tuple[Group, Storage], float],
    points: Sequence[Point],
) -> None:
    """Write `plan.json`, `auto.json` and `auto.svg`, each atomically.

    Raises:
        OutputError: writing failed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create the folder {folder} ({error.strerror}); choose another one"
        ) from error
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
    write_text_file(folder / "plan.json", plan.to_json())
    write_text_file(folder / "auto.json", json.dumps(raw, indent=1) + "\n")
    if any(point.kind == "auto" for point in points):
        title = f"{Path(model).name}: what each byte of weights buys"
        write_text_file(folder / "auto.svg", to_svg(points, title))
