"""`neo-engine BUNDLE`: build a TensorRT plan for a bundle, or list its plans."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.command.command_line import OneLineParser, add_version, run_command
from neo_runtime.errors import RequestError

from neo_export.reports.stages import StageLine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_export.engine.build import BuiltEngine
    from neo_export.engine.ranges import EngineRequest

__all__ = ["main"]

_EPILOG = """\
BUNDLE must have been written by neo-export --target tensorrt. neo-engine builds one plan from its
prefill graph, with an optimization profile for prompts and one for single tokens, and writes it to
BUNDLE/engines with a record of what it was built for. Progress goes to stderr, the summary to
stdout. Exit status: 0 built, 2 not built, 130 interrupted.
"""
_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="neo-engine",
        description="Build a TensorRT plan for a bundle.",
        epilog=_EPILOG,
    )
    add_version(parser)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder with neo.json")
    for what, unit, optimum, most in (
        ("length", "tokens per prompt chunk", "128", "all positions"),
        ("batch", "sequences per call", "--min-batch", "--opt-batch"),
    ):
        for which, text, default in (
            ("min", f"fewest {unit}", "1"),
            ("opt", f"{unit} to optimize for", optimum),
            ("max", f"most {unit}", most),
        ):
            parser.add_argument(
                f"--{which}-{what}",
                type=int,
                default=1 if which == "min" else None,
                metavar="N",
                help=f"{text} (default: {default})",
            )
    parser.add_argument(
        "--max-logit-positions",
        type=int,
        metavar="N",
        help="most positions per call for which logits are computed; scoring runs in chunks of "
        "this size (default: 256, or --max-length if that is smaller)",
    )
    parser.add_argument(
        "--workspace",
        type=_bytes,
        metavar="SIZE",
        help="most workspace memory per layer, for example 512M or 2G (default: no limit)",
    )
    parser.add_argument(
        "--optimization-level",
        type=int,
        default=3,
        metavar="0-5",
        help="TensorRT's builder optimization level (default: 3)",
    )
    for flag, text in (
        (
            "--version-compatible",
            "let newer TensorRT releases of the same major version run the plan",
        ),
        ("--stripped", "leave the weights out of the plan"),
        ("--refit", "allow the weights of the loaded plan to be refitted"),
    ):
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument(
        "--flavour",
        choices=("tensorrt", "tensorrt_rtx"),
        help="which TensorRT to build with (default: the installed one)",
    )
    parser.add_argument(
        "--compute-capability",
        metavar="X.Y",
        help="build for GPUs of this compute capability, such as 8.9 (default: this machine's GPU)",
    )
    parser.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="file that keeps kernel timings between builds (default: BUNDLE/engines/timing.cache)",
    )
    parser.add_argument(
        "--list", action="store_true", help="list the existing plans instead of building one"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(
        "neo-engine",
        lambda: _list(arguments) if arguments.list else _build(arguments),
        extras="tensorrt",
        interrupted="interrupted, nothing was written",
    )


def _build(arguments: argparse.Namespace) -> int:
    from neo_export.engine.build import build_engine, read_bundle
    from neo_export.engine.device import device_for
    from neo_export.engine.flavour import find_flavour
    from neo_export.engine.ranges import resolve_options

    request = _request(arguments)
    resolve_options(request, read_bundle(arguments.bundle))
    flavour = find_flavour(arguments.flavour)
    device = device_for(flavour, arguments.compute_capability)
    with StageLine("neo-engine") as bar:
        built = build_engine(
            arguments.bundle, request, flavour, device, bar.show, arguments.timing_cache
        )
    print(json.dumps(asdict(built.record), indent=1) if arguments.json else report(built))
    return 0


def _request(arguments: argparse.Namespace) -> EngineRequest:
    from neo_export.engine.ranges import EngineRequest

    for name in ("opt_length", "max_length", "opt_batch", "max_batch", "max_logit_positions"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise RequestError(f"--{name.replace('_', '-')} is {value}, expected 1 or more")
    return EngineRequest(
        min_length=arguments.min_length,
        opt_length=arguments.opt_length,
        max_length=arguments.max_length,
        min_batch=arguments.min_batch,
        opt_batch=arguments.opt_batch,
        max_batch=arguments.max_batch,
        max_logit_positions=arguments.max_logit_positions,
        workspace_bytes=arguments.workspace,
        optimization_level=arguments.optimization_level,
        version_compatible=arguments.version_compatible,
        stripped=arguments.stripped,
        refit=arguments.refit,
    )


def _bytes(text: str) -> int:
    number, suffix = text.upper().removesuffix("B").removesuffix("I"), ""
    if number[-1:] in ("K", "M", "G"):
        number, suffix = number[:-1], number[-1]
    try:
        return int(float(number) * _SUFFIXES[suffix])
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size, expected a number of bytes or, for example, 512M or 2G"
        ) from error


def _list(arguments: argparse.Namespace) -> int:
    from neo_runtime.bundle.engine_record import read_records

    from neo_export.engine.build import read_bundle

    digest = read_bundle(arguments.bundle).digest
    records = read_records(arguments.bundle)
    if arguments.json:
        print(json.dumps([asdict(record) for record in records], indent=1))
        return 0
    for record in records:
        stale = "" if record.bundle_digest == digest else "; built for another bundle, will not run"
        print(
            f"{record.file}: {record.size / 1e6:,.1f} MB, {record.flavour} {record.version}, "
            f"compute capability {record.compute_capability}, {record.gpu or 'any such GPU'}, "
            f"chunks up to {record.options.max_length}, batch up to {record.options.max_batch}"
            f"{stale}"
        )
    if not records:
        print(f"{arguments.bundle} has no plans")
    return 0


def report(built: BuiltEngine) -> str:
    """The human-readable summary of a build."""
    record, options = built.record, built.record.options
    lines = [
        f"plan        {built.path}",
        f"for         compute capability {record.compute_capability}, "
        f"{record.gpu or 'any such GPU'}; {record.flavour} {record.version}",
        f"profiles    decode: 1 token; prefill: {options.min_length} to {options.max_length}, "
        f"optimized for {options.opt_length}; batch {options.min_batch} to {options.max_batch}; "
        f"logits of up to {options.max_logit_positions} positions",
        f"size        {record.size / 1e6:,.1f} MB; the bundle's weights are "
        f"{built.weight_bytes / 1e6:,.1f} MB",
        f"time        {record.build_seconds:.1f} s",
    ]
    lines += [f"TensorRT    {warning}" for warning in built.warnings]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
