"""`neo-diff BUNDLE --reference MODEL`: may this bundle ship, and if not, where is the fault?"""

from __future__ import annotations

import json
import math
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_export.files.text_file import write_text_file
from neo_export.reports.stages import StageLine
from neo_runtime.command.command_line import run_command
from neo_runtime.command.standard_streams import json_text
from neo_runtime.errors import OutputError, RequestError

from neo_tools.diff.cli_options import make_parser

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from neo_tools.diff.results import Results
    from neo_tools.diff.settings import Settings

__all__ = ["main"]

_PAST = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    arguments = make_parser().parse_args(argv)
    extras = "diff-gpu" if arguments.backend == "cuda" else "diff"
    return run_command("neo-diff", lambda: _run(arguments), extras=extras)


def _run(arguments: argparse.Namespace) -> int:
    files = [path for path in (arguments.html, _json_file(arguments)) if path is not None]
    for path in files:
        _require_writable(path)
    if len({path.resolve() for path in files}) < len(files):
        raise RequestError(f"--html and --json both name {files[0]}; give them two files")
    results = _compare(arguments)
    _write(results, arguments)
    return 0 if results.passed or arguments.report_only else _PAST


def _compare(arguments: argparse.Namespace) -> Results:
    # Slow imports are here, so that --help and usage errors answer at once.
    from neo_tools.diff.run import compare

    with StageLine("neo-diff") as line:
        results = compare(_settings(arguments), None if arguments.quiet else line.show)
    for warning in results.warnings:
        print(f"neo-diff: warning: {warning}", file=sys.stderr)
    return results


def _settings(arguments: argparse.Namespace) -> Settings:
    from neo_tools.diff.settings import Settings
    from neo_tools.diff.thresholds import Limits

    return Settings(
        bundle=arguments.bundle,
        reference=arguments.reference,
        base=arguments.base,
        text=arguments.text,
        tokens=arguments.tokens,
        context=arguments.context,
        decode_positions=arguments.decode_positions,
        prefill_chunk=arguments.prefill_chunk,
        localize_tokens=arguments.localize_tokens,
        continuations=arguments.continuations,
        backend=arguments.backend,
        device=arguments.device,
        threads=arguments.threads,
        limits=Limits(
            max_kl=arguments.max_kl,
            min_top_1=arguments.min_top1,
            max_perplexity_increase=arguments.max_ppl_increase,
            max_logit_error=arguments.max_logit_error,
        ),
    )


def _json_file(arguments: argparse.Namespace) -> Path | None:
    """The file for JSON; None for no JSON or stdout."""
    return Path(arguments.json) if arguments.json not in (None, "-") else None


def _write(results: Results, arguments: argparse.Namespace) -> None:
    from neo_tools.diff.html import page
    from neo_tools.diff.report import report

    found = _finite(results.to_json())
    # stdout first: if a file cannot be written, minutes of work are not lost.
    sys.stdout.write(f"{json_text(found)}\n" if arguments.json == "-" else report(results))
    with ExitStack() as files:  # each file is tried, even if writing the other one fails
        if arguments.html is not None:
            files.callback(write_text_file, arguments.html, page(results))
        if path := _json_file(arguments):
            text = json.dumps(found, ensure_ascii=False, allow_nan=False)
            files.callback(write_text_file, path, f"{text}\n")


def _finite(value: Any) -> Any:
    """The same value with null for NaN and infinities, which JSON cannot represent."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _require_writable(path: Path) -> None:
    """Raise OutputError before minutes of work if the file cannot be written."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OutputError(f"cannot write {path}: its folder does not exist, or it is one itself")


if __name__ == "__main__":
    sys.exit(main())
