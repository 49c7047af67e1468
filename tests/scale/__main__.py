"""`python -m tests.scale [STEP …]`: run the steps, write the report."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.errors import NeoError

from .checkpoint import SIZES
from .figures import StepResult
from .report import machine, to_json, to_markdown
from .session import ROOT, Session, Settings, say
from .steps import STEPS, SkippedError, Step

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHAPE = ("hidden_size", "num_layers", "num_heads", "vocab_size", "max_position_embeddings")


def main(argv: Sequence[str] | None = None) -> int:
    """0: all figures within their limits, 1: one is not, or a step broke off, 2: wrong usage."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join(f"{step.name:<14}{step.summary}" for step in STEPS))
        return 0
    names = [step.name for step in STEPS]
    if unknown := set(arguments.steps) - set(names):
        parser.error(f"no step is called {min(unknown)!r}; there are {', '.join(names)}")
    if arguments.checkpoint and not (arguments.checkpoint / "config.json").is_file():
        parser.error(f"{arguments.checkpoint} is not a checkpoint: it has no config.json")
    session = Session(
        Settings(
            size=arguments.size,
            checkpoint=arguments.checkpoint,
            work=arguments.work,
            every_step=not arguments.sample,
            keep=arguments.keep,
        )
    )
    chosen = [step for step in STEPS if not arguments.steps or step.name in arguments.steps]
    where, results = machine(), []
    try:
        for index, step in enumerate(chosen, start=1):
            say(f"[{index}/{len(chosen)}] {step.name}: {step.summary}")
            results.append(_run(step, session))
            say(f"[{index}/{len(chosen)}] {step.name}: {results[-1].verdict}")
            _write(arguments.report, session, where, results)  # nothing is lost to a later crash
    finally:
        session.close()
    say(f"report: {arguments.report}")
    return int(any(result.verdict in ("failed", "error") for result in results))


def _run(step: Step, session: Session) -> StepResult:
    """One step's result, whatever happens in it: the others shall run."""
    started = time.perf_counter()
    figures, skipped, error = [], "", ""
    try:
        figures = step.run(session)
    except SkippedError as reason:
        skipped = str(reason)
    except NeoError as reason:
        error = str(reason)
    except Exception:
        error = traceback.format_exc()
    for line in (skipped or error).splitlines():
        say(line)
    return StepResult(
        name=step.name,
        summary=step.summary,
        seconds=time.perf_counter() - started,
        figures=tuple(figures),
        skipped=skipped,
        error=error,
    )


def _write(
    report: Path, session: Session, where: dict[str, str], results: Sequence[StepResult]
) -> None:
    shape = {"name": session.checkpoint.name} | {key: session.config.get(key) for key in _SHAPE}
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(to_markdown(shape, where, results), encoding="utf-8")
    report.with_suffix(".json").write_text(to_json(shape, where, results), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.scale",
        description="Check what needs the published 1.3B shape; figures go into a report.",
        epilog="exit status: 0 all within the limits, 1 one is not or a step broke, 2 wrong usage",
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help="default: all of them")
    parser.add_argument("--list", action="store_true", help="list the steps and stop")
    parser.add_argument(
        "--report",
        type=Path,
        default=ROOT / "build/scale-report.md",
        help="Markdown to write, with JSON beside it (default: build/scale-report.md)",
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="1.3b",
        help="of the random checkpoint to write; 125m for a quick trial (default: 1.3b)",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="use this one instead of writing one"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build/scale",
        metavar="DIR",
        help="folder for 25 GB of checkpoints and bundles (default: build/scale)",
    )
    parser.add_argument(
        "--sample",
        action="store_true",
        help="decode around the window and at the ends only, not at every position",
    )
    parser.add_argument("--keep", action="store_true", help="leave the bundles in the work folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
