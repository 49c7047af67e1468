"""`neo-diff BUNDLE --reference MODEL`: may this bundle ship, and if not, where does it go wrong?"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from neo_runtime.errors import NeoError, OutputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_tools.diff.results import Results
    from neo_tools.diff.settings import Settings

__all__ = ["main"]

_PAST, _WRONG, _INTERRUPTED, _BROKEN_PIPE = 1, 2, 130, 141
_EPILOG = """MODEL is the checkpoint that the bundle was made of (a Hugging Face folder, a hub id,
modelscope:…), run by PyTorch: GPT-Neo, eager, float32, a layer at a time. Or another bundle: then
errors are accumulated ones only.

Without --text the held-out stories that come with the package are read. FILE is plain text, or
JSON lines (.jsonl) with "text" or "prompt". It is cut into contexts of the model's full length, so
that positions past the attention window count.

  neo-diff mini-int4 --reference neo-mini
  neo-diff gpt-neo-1.3b-int8 --reference EleutherAI/gpt-neo-1.3B --text wiki.txt --html report.html
  neo-diff mini-int8 --reference neo-mini --json --max-kl 0.01 --min-top1 0.95

exit status: 0 within all limits (or --report-only); 1 past one; 2 wrong usage or bad input"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the long usage."""
        self.exit(_WRONG, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    arguments = _parser().parse_args(argv)
    progress = _Progress(quiet=arguments.quiet)
    try:
        for path in (arguments.html, _json_file(arguments)):
            _require_writable(path)
        results = _compare(arguments, progress)
        progress.end()
        _write(results, arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        progress.end()
        return _INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more at its end: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except (NeoError, OSError) as error:
        progress.end()
        print(f"neo-diff: {' '.join(str(error).split())}", file=sys.stderr)
        return _WRONG
    except ImportError as error:
        progress.end()
        print(
            f"neo-diff: the package {error.name} is missing; "
            "install neo-onnx with its extra: pip install 'neo-onnx[diff]'",
            file=sys.stderr,
        )
        return _WRONG
    return 0 if results.passed or arguments.report_only else _PAST


def _compare(arguments: argparse.Namespace, progress: _Progress) -> Results:
    # Only now what is slow to import: --help and wrong usage answer at once.
    from neo_tools.diff.run import compare

    results = compare(_settings(arguments), progress.show)
    for warning in results.warnings:
        progress.end()
        print(f"neo-diff: warning: {warning}", file=sys.stderr)
    return results


def _settings(arguments: argparse.Namespace) -> Settings:
    from neo_tools.diff.settings import Settings
    from neo_tools.diff.thresholds import Limits

    return Settings(
        bundle=arguments.bundle,
        reference=arguments.reference,
        text=arguments.text,
        tokens=arguments.tokens,
        context=arguments.context,
        decode_positions=arguments.decode_positions,
        prefill_chunk=arguments.prefill_chunk,
        localize_tokens=arguments.localize_tokens,
        continuations=arguments.continuations,
        threads=arguments.threads,
        limits=Limits(
            max_kl=arguments.max_kl,
            min_top_1=arguments.min_top1,
            max_perplexity_increase=arguments.max_ppl_increase,
            max_logit_error=arguments.max_logit_error,
        ),
    )


def _json_file(arguments: argparse.Namespace) -> Path | None:
    """Where JSON goes; None for nowhere or stdout."""
    return Path(arguments.json) if arguments.json not in (None, "-") else None


def _write(results: Results, arguments: argparse.Namespace) -> None:
    from neo_tools.diff.html import page
    from neo_tools.diff.report import report

    if arguments.html is not None:
        _write_file(arguments.html, page(results))
    text = json.dumps(_finite(results.to_json()), ensure_ascii=False, allow_nan=False) + "\n"
    if path := _json_file(arguments):
        _write_file(path, text)
    sys.stdout.write(text if arguments.json == "-" else report(results))


def _finite(value: Any) -> Any:
    """The same with null for what JSON cannot hold: NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _require_writable(path: Path | None) -> None:
    """Say so before minutes of work: raises OutputError."""
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OutputError(f"cannot write {path}: its folder does not exist, or it is one itself")


def _write_file(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


class _Progress:
    """Stages on stderr: rewritten in place on a terminal, else a line each tenth of a stage."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._stage = ""
        self._tenths = -1
        self._began = time.monotonic()
        self._open = False

    def show(self, stage: str, done: int, total: int) -> None:
        tenths = 10 * done // total if total else -1
        if self._quiet or (stage, tenths) == (self._stage, self._tenths):
            return
        if stage != self._stage:
            self.end()
            self._stage, self._began = stage, time.monotonic()
        self._tenths = tenths
        elapsed = time.monotonic() - self._began
        text = f"neo-diff: {stage} {10 * max(0, tenths)} % ({elapsed:.0f} s)"
        if sys.stderr.isatty():
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
            self._open = True
        else:
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._open:
            print(file=sys.stderr)
            self._open = False


def _count(least: int) -> type:
    """A type of argument: whole numbers from `least` on."""

    class Count(int):
        def __new__(cls, text: str) -> Count:
            number = super().__new__(cls, text)
            if number < least:
                raise argparse.ArgumentTypeError(f"{text} is too small; at least {least}")
            return number

    Count.__name__ = "number"  # what argparse calls it in its message
    return Count


def _positions(text: str) -> int | None:
    if text == "all":
        return None
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 1 on nor `all`")
    return number


def _limit(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="neo-diff",
        usage="%(prog)s BUNDLE --reference MODEL [options]",
        description="Compare what a bundle computes with PyTorch, position by position and place "
        "by place, and name the first place that is wrong.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("--reference", metavar="MODEL", required=True, help="see below")
    parser.add_argument("--text", metavar="FILE", type=Path, help="what to compare on")
    parser.add_argument(
        "--tokens", metavar="N", type=_count(2), default=4096, help="how many of it (4096)"
    )
    parser.add_argument(
        "--context", metavar="N", type=_count(2), help="tokens of a context (the bundle's length)"
    )
    parser.add_argument(
        "--decode-positions",
        metavar="N|all",
        type=_positions,
        default=32,
        help="positions of each context that go through decode, token by token: at its start, "
        "around the window's end, and at its end (32)",
    )
    _add_output(parser.add_argument_group("output"))
    _add_limits(
        parser.add_argument_group(
            "limits", "by default those of the bundle's precision (docs/accuracy.md)"
        )
    )
    _add_details(parser.add_argument_group("details"))
    return parser


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        help="everything that was found; without FILE on stdout, in place of the summary",
    )
    group.add_argument("--html", metavar="FILE", type=Path, help="one page with the plots")
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _add_limits(group: argparse._ArgumentGroup) -> None:
    for option, text in (
        ("--max-kl", "largest mean KL(reference ‖ bundle), nats"),
        ("--min-top1", "smallest share of positions with the same best token"),
        ("--max-ppl-increase", "largest perplexity, bundle / reference − 1"),
        ("--max-logit-error", "largest relative L2 error of the logits, median over positions"),
    ):
        group.add_argument(option, metavar="X", type=_limit, help=text)
    group.add_argument(
        "--report-only", action="store_true", help="exit with 0 whatever the limits say"
    )


def _add_details(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prefill-chunk", metavar="N", type=_count(1), default=512, help="tokens a call (512)"
    )
    group.add_argument(
        "--localize-tokens",
        metavar="N",
        type=_count(0),
        default=2048,
        help="look at the places of as many contexts as fit N tokens, at least one; 0: none (2048)",
    )
    group.add_argument(
        "--continuations", metavar="N", type=_count(0), default=4, help="greedy texts (4)"
    )
    group.add_argument("--threads", metavar="N", type=_count(1), help="(physical cores)")


if __name__ == "__main__":
    sys.exit(main())
