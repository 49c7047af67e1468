"""Where the commands of this package begin."""

from __future__ import annotations

from neo_runtime.entry import entry

__all__ = ["calibrate"]

calibrate = entry("neo_calibration.cli")
