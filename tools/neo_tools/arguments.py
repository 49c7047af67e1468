"""Command-line options and argument types that several commands share."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from neo_runtime.backends.choice import BACKENDS
from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = [
    "add_backend",
    "add_device",
    "add_numbers",
    "add_running",
    "at_least",
    "labels_of",
    "number_from",
]


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: integers of at least `least`."""

    def number(text: str) -> int:  # argparse shows this name in its messages
        found = int(text)
        if found < least:
            raise argparse.ArgumentTypeError(f"{found} is too small, expected at least {least}")
        return found

    return number


def number_from(least: float, most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: numbers from `least` to `most`, both included."""
    expected = f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least:g}"

    def number(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not least <= found <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {expected}")
        return found

    return number


def add_numbers(parser: argparse.ArgumentParser, *numbers: tuple[str, str, int, str]) -> None:
    """Add options for integers of at least 1.

    Args:
        parser: the parser.
        numbers: short name, long name, default and help of each option.
    """
    for short, long, default, text in numbers:
        parser.add_argument(
            short,
            long,
            metavar="N",
            type=at_least(1),
            default=default,
            help=f"{text} (default: {default})",
        )


def add_backend(parser: argparse.ArgumentParser, text: str) -> None:
    """Add `--backend` (with help `text`) and `--device`, as for `neo_runtime.load`."""
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help=text)
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument(
        "--device", metavar="N", type=at_least(0), default=0, help="index of the GPU (default: 0)"
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """Add `--threads`, `--backend`, `--device` and `--json`."""
    parser.add_argument(
        "-t", "--threads", metavar="N", type=at_least(1), help="threads (default: physical cores)"
    )
    add_backend(parser, "backend that runs the bundle (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Labels of bundles: folder names, or whole paths if several have the same name.

    Raises:
        RequestError: a bundle is named twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise RequestError("a bundle is named twice; name each of them once")
    names = [path.resolve().name for path in paths]
    return [
        name if names.count(name) == 1 else str(path)
        for name, path in zip(names, paths, strict=True)
    ]
