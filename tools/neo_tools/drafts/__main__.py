"""`python -m neo_tools.drafts BUNDLE`: what guessed tokens save."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_runtime.command.command_line import OneLineParser, run_command
from neo_runtime.command.prompts import read_prompts
from neo_runtime.errors import RequestError

import neo_tools.drafts
from neo_tools.arguments import add_numbers, add_running, at_least

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from neo_runtime.model import Model

    from neo_tools.drafts.report import Continued

__all__ = ["main"]

_PROGRAM = "python -m neo_tools.drafts"
_COUNTS = (2, 3, 5, 9, 17)
"""Tokens that are checked at once: a guess, and the token before it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(_PROGRAM, lambda: _run(arguments), extras="bench")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.draft_model is not None and arguments.prompts_file is None:
        raise RequestError("--draft-model needs --prompts-file: it guesses for real text alone")
    import neo_runtime

    from neo_tools.bench.machine import machine_facts
    from neo_tools.drafts.measure import checking_seconds
    from neo_tools.drafts.report import checked, markdown, plain

    settings = {"threads": arguments.threads, "backend": arguments.backend}
    small = arguments.draft_model
    with (
        neo_runtime.load(arguments.bundle, **settings) as model,
        nullcontext() if small is None else neo_runtime.load(small, **settings) as draft_model,
    ):
        _progress("checking")
        costs = checked(checking_seconds(model, arguments.depth, _COUNTS, arguments.repetitions))
        ways = [] if arguments.prompts_file is None else _texts(arguments, model, draft_model)
        facts: dict[str, Any] = {
            "bundle": arguments.bundle.resolve().name,
            "precision": model.manifest.precision,
            "runs_on": model.runs_on,
            "machine": machine_facts().cpu,
            "repetitions": arguments.repetitions,
            "depth": arguments.depth,
            "prompts": arguments.prompts,
            "new_tokens": arguments.new_tokens,
        }
    if arguments.json:
        print(json.dumps(plain(costs, ways, facts), indent=2))
    else:
        sys.stdout.write(markdown(costs, ways, facts))
    return 0


def _texts(
    arguments: argparse.Namespace, model: Model, draft_model: Model | None
) -> list[Continued]:
    from neo_runtime import DraftModel, PromptLookup

    from neo_tools.drafts.measure import texts
    from neo_tools.drafts.report import continued

    given = read_prompts(None, arguments.prompts_file, ids=False)
    prompts = [prompt for prompt, _ in given][: arguments.prompts]
    arguments.prompts = len(prompts)
    drafters: dict[str, Any] = {"prompt lookup": PromptLookup(arguments.draft_tokens)}
    if draft_model is not None:
        drafters["draft model"] = DraftModel(draft_model, arguments.draft_tokens)
    found = texts(model, prompts, arguments.new_tokens, drafters, arguments.repetitions, _progress)
    return continued(found)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog=_PROGRAM, description=neo_tools.drafts.__doc__)
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder with neo.json")
    parser.add_argument("--draft-model", metavar="BUNDLE", type=Path, help="a small model, too")
    parser.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="prompts as neo-generate takes them; without any only the checking is measured",
    )
    add_numbers(
        parser,
        ("-d", "--depth", 128, "tokens before those that are checked"),
        ("-r", "--repetitions", 5, "rounds"),
    )
    parser.add_argument(
        "-n",
        "--new-tokens",
        metavar="N",
        type=at_least(2),
        default=64,
        help="new tokens of a prompt (default: 64)",
    )
    parser.add_argument(
        "--prompts",
        metavar="N",
        type=at_least(1),
        help="take the first N prompts (default: all)",
    )
    parser.add_argument(
        "--draft-tokens",
        metavar="N",
        type=at_least(1),
        default=10,
        help="guess at most N tokens at once (default: 10)",
    )
    add_running(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
