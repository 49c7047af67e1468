"""The entry points of this package's commands."""

from __future__ import annotations

from neo_runtime.entry import entry

__all__ = ["calibrate"]

calibrate = entry("neo_calibration.cli")
