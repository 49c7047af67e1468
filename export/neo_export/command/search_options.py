"""Options of `neo-export --auto`, checked early and translated to arguments of the search."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.errors import OutputError, RequestError

if TYPE_CHECKING:
    import argparse

__all__ = [
    "add_search_options",
    "check_divergence",
    "check_report_folder",
    "parse_size",
    "search_arguments",
]


def add_search_options(group: argparse._ArgumentGroup) -> None:
    """Add --max-kl, --max-size and --auto-report."""
    limit = group.add_mutually_exclusive_group()
    limit.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="--auto: the smallest bundle whose mean KL divergence from float32 is at most this",
    )
    limit.add_argument(
        "--max-size",
        metavar="SIZE",
        help="--auto: the most accurate bundle of at most SIZE bytes of weights; a value below 1 "
        "is a fraction of the float32 size",
    )
    group.add_argument(
        "--auto-report",
        type=Path,
        metavar="FOLDER",
        help="--auto: write the plan, all measurements and a plot of size against divergence into "
        "this folder (measures a few more bundles)",
    )


def search_arguments(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    """Arguments for `python -m neo_calibration.auto`; None without --auto.

    Raises:
        RequestError: an option is missing, out of range, or cannot be combined with another.
        OutputError: the report cannot be written to its folder.
    """
    limits = {"--max-kl": arguments.max_kl, "--max-size": arguments.max_size}
    given = {flag: value for flag, value in limits.items() if value is not None}
    if not arguments.auto:
        flag = next(iter(given), "--auto-report" if arguments.auto_report else None)
        if flag is not None:
            raise RequestError(f"{flag} can only be used with --auto")
        return None
    if not given:
        raise RequestError("--auto needs a limit; add --max-kl NATS or --max-size SIZE")
    if arguments.calibrate_text is None:
        raise RequestError("--auto needs text to measure on; add --calibrate-text FILE")
    if arguments.target not in (None, "cpu") or arguments.tensorrt:
        raise RequestError(
            "--auto measures bundles for the CPU; for another target, export with --plan and the "
            "plan.json that --auto-report writes"
        )
    if arguments.max_kl is not None:
        check_divergence(arguments.max_kl)
    else:
        parse_size(arguments.max_size)
    pairs = [*given.items(), *(("--keep-fp32", pattern) for pattern in arguments.keep_fp32)]
    if arguments.kv_cache != "float":
        pairs.append(("--kv-cache", arguments.kv_cache))
    if arguments.auto_report is not None:
        check_report_folder(arguments.auto_report)
        pairs.append(("--report", arguments.auto_report))
    return tuple(f"{flag}={value}" for flag, value in pairs)  # a value may begin with a dash


def check_divergence(limit: float) -> None:
    """Refuse a --max-kl that is not a positive number of nats.

    Raises:
        RequestError: the limit is not one.
    """
    if not 0 < limit < math.inf:
        raise RequestError(f"--max-kl is {limit:g}, expected a finite number of nats above 0")


def parse_size(text: str) -> float:
    """--max-size: a number of bytes, or a fraction below 1.

    Raises:
        RequestError: the text is neither.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise RequestError(f"--max-size is {text!r}, expected bytes, or a fraction below 1")
    return number


def check_report_folder(folder: Path) -> None:
    """Refuse a path that cannot become a folder.

    Raises:
        OutputError: the path, or one of its parents, exists and is not a folder.
    """
    for path in (folder, *folder.parents):
        if path.exists():
            if not path.is_dir():
                raise OutputError(
                    f"cannot write a report to {folder}: {path} is not a folder; choose another one"
                )
            return
