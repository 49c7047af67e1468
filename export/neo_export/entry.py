"""Where the commands of this package begin."""

from __future__ import annotations

from neo_runtime.entry import entry

__all__ = ["engine", "export", "kernels"]

engine = entry("neo_export.engine.cli")
export = entry("neo_export.command.cli")
kernels = entry("neo_export.kernels.cli")
