"""The command line of the peers' workers. Uses only the standard library."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["parse_arguments"]


def parse_arguments(argv: Sequence[str], precisions: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments that all workers share.

    Args:
        argv: the arguments.
        precisions: precisions that the worker can load; the first is the default.

    Returns:
        `model` (Path), `precision`, `threads` and `device`.
    """
    parser = argparse.ArgumentParser(description="A peer's worker: JSON lines on stdin and stdout.")
    parser.add_argument("--model", type=Path, required=True, help="folder to load")
    parser.add_argument("--precision", choices=precisions, default=precisions[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="torch only: cpu, or cuda:0")
    return parser.parse_args(argv)
