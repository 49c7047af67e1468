"""`neo-eval BUNDLE [BUNDLE …] --tasks LIST`: scores on tasks, and the loss by quantization."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.command.command_line import OneLineParser, add_version, run_command
from neo_runtime.errors import RequestError

from neo_tools.arguments import add_backend, at_least, labels_of, number_from

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from lm_eval.api.model import LM

    from neo_tools.evaluate.paired import Results

__all__ = ["main"]

_WORSE = 1
_EPILOG = """Tasks are those of lm-evaluation-harness (`lm_eval ls tasks`): lambada_openai, piqa,
winogrande, hellaswag, wikitext, …; their data sets are downloaded from the Hugging Face hub, unless
a task of your own (--include-path) reads local files.

The baseline is --reference if given, else the first BUNDLE. The other models answer the same
questions, so the differences are paired: the standard error is that of the mean per-sample
difference.

  neo-eval gpt-neo-fp32 gpt-neo-int4 --tasks lambada_openai,piqa --max-drop 0.01

exit status: 0 success; 1 a mean, such as an accuracy, is lower than the baseline's by more than
--max-drop; 2 wrong usage, or a model or task that cannot be run; 130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    return run_command("neo-eval", lambda: _run(arguments), extras="cpu,eval")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.quiet:
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    names = dict(zip(labels_of(arguments.bundles), arguments.bundles, strict=True))
    if arguments.max_drop is not None and arguments.reference is None and len(names) < 2:
        raise RequestError(
            "--max-drop needs a baseline: give it as a first bundle before this one, or as "
            "--reference MODEL"
        )
    if arguments.include_path is not None and not arguments.include_path.is_dir():
        raise RequestError(
            f"--include-path {arguments.include_path} is not a folder; give one with YAML tasks"
        )
    from neo_tools.evaluate.gate import NOTHING_CHECKED, checks, verdict
    from neo_tools.evaluate.lm import NeoLM
    from neo_tools.evaluate.paired import tabulated
    from neo_tools.evaluate.report import markdown, plain
    from neo_tools.evaluate.run import reference_model

    results: dict[str, Results] = {}
    if arguments.reference is not None:
        _say(f"{arguments.reference}: in PyTorch", arguments)
        name = f"PyTorch {Path(arguments.reference).name}"
        results[name] = _evaluated(reference_model(arguments.reference), arguments)
    for name, path in names.items():
        _say(name, arguments)
        model = NeoLM(
            path,
            backend=arguments.backend,
            device=arguments.device,
            threads=arguments.threads,
            show_progress=not arguments.quiet,
        )
        with closing(model):
            results[name] = _evaluated(model, arguments)
    table, baseline = tabulated(results), next(iter(results))
    checked = None if arguments.max_drop is None else checks(table, arguments.max_drop)
    if arguments.json:
        print(json.dumps(plain(table, baseline, checked), indent=1))
    else:
        sys.stdout.write(markdown(table, baseline))
        if checked:
            sys.stdout.write("\n" + verdict(checked))
    if checked == []:
        raise RequestError(NOTHING_CHECKED)
    return 0 if all(one.passed for one in checked or ()) else _WORSE


def _evaluated(model: LM, arguments: argparse.Namespace) -> Results:
    from neo_tools.evaluate.run import evaluated

    return evaluated(
        model,
        arguments.tasks.split(","),
        include_path=arguments.include_path,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
    )


def _say(line: str, arguments: argparse.Namespace) -> None:
    if not arguments.quiet:
        print(f"neo-eval: {line}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="neo-eval",
        usage="%(prog)s [options] BUNDLE [BUNDLE ...] --tasks LIST",
        description="Measure bundles by tasks of lm-evaluation-harness, and compare them.",
        epilog=_EPILOG,
    )
    add_version(parser)
    parser.add_argument(
        "bundles", metavar="BUNDLE", nargs="+", type=Path, help="folders written by neo-export"
    )
    parser.add_argument("--tasks", metavar="LIST", required=True, help="tasks, separated by commas")
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="baseline: a checkpoint (folder or Hugging Face id), run by PyTorch in float32 (needs "
        "lm_eval[hf])",
    )
    parser.add_argument(
        "--include-path", metavar="FOLDER", type=Path, help="folder with further tasks, as YAML"
    )
    parser.add_argument(
        "--num-fewshot",
        metavar="N",
        type=at_least(0),
        help="examples before each question (default: set by the task)",
    )
    parser.add_argument(
        "--limit", metavar="N", type=at_least(1), help="only the first N samples of each task"
    )
    parser.add_argument(
        "--max-drop",
        metavar="X",
        type=number_from(-1),  # below 0: a required gain
        help="fail if a mean is lower than the baseline's by more than X (default: never)",
    )
    add_backend(parser, "backend that runs the bundles (default: auto)")
    parser.add_argument(
        "--threads",
        metavar="N",
        type=at_least(1),
        help="threads per operator (default: physical cores)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quiet", action="store_true", help="show no progress on stderr")
    return parser


if __name__ == "__main__":
    sys.exit(main())
