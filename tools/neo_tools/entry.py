"""Entry points of the installed commands."""

from __future__ import annotations

from neo_runtime.entry import entry

__all__ = ["bench", "diff", "evaluate"]

bench = entry("neo_tools.bench.cli")
diff = entry("neo_tools.diff.cli")
evaluate = entry("neo_tools.evaluate.cli")
