"""`python -m neo_tools.drafts BUNDLE`: the gain from speculative decoding."""

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
    from neo_runtime.text.prompts import Prompt

    from neo_tools.drafts.report import Continued

__all__ = ["main"]

_PROGRAM = "python -m neo_tools.drafts"
_COUNTS = (2, 3, 5, 9, 17)
"""Numbers of tokens verified at once: those of a draft, and the token before it."""
_NEW_TOKENS, _DRAFT_TOKENS = 64, 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(_PROGRAM, lambda: _run(arguments), extras="bench")


def _run(arguments: argparse.Namespace) -> int:
    given = _given(arguments)
    import neo_runtime

    from neo_tools.bench.machine import machine_facts
    from neo_tools.drafts.measure import checking_seconds
    from neo_tools.drafts.report import checked, markdown, plain

    settings: dict[str, Any] = {
        "threads": arguments.threads,
        "backend": arguments.backend,
        "device": arguments.device,
        "keep_prepacked": True if arguments.keep_prepacked else None,
    }
    small = arguments.draft_model
    with (
        neo_runtime.load(arguments.bundle, **settings) as model,
        nullcontext() if small is None else neo_runtime.load(small, **settings) as draft_model,
    ):
        most = model.manifest.max_length - max(_COUNTS)
        if arguments.depth > most:
            raise RequestError(
                f"--depth is {arguments.depth}, expected at most {most}, as the bundle has "
                f"{model.manifest.max_length} positions"
            )
        # The texts first: prompts or options may be refused.
        ways = _texts(arguments, model, draft_model, given) if given else []
        _progress("verifying")
        costs = checked(checking_seconds(model, arguments.depth, _COUNTS, arguments.repetitions))
        facts: dict[str, Any] = {
            "bundle": arguments.bundle.resolve().name,
            "precision": model.manifest.precision,
            "runs_on": model.runs_on,
            "machine": machine_facts().cpu,
            "repetitions": arguments.repetitions,
            "depth": arguments.depth,
            "new_tokens": arguments.new_tokens or _NEW_TOKENS,
        }
    if arguments.json:
        print(json.dumps(plain(costs, ways, facts), indent=2))
    else:
        sys.stdout.write(markdown(costs, ways, facts))
    return 0


def _given(arguments: argparse.Namespace) -> list[Prompt]:
    """The prompts in the file; empty without a file.

    Raises:
        RequestError: the file cannot be used; or there is none, but an option needs it.
    """
    if arguments.prompts_file is not None:
        return [prompt for prompt, _ in read_prompts(None, arguments.prompts_file, ids=False)]
    for name in ("draft_model", "prompts", "prompt_tokens", "new_tokens", "draft_tokens"):
        if getattr(arguments, name) is not None:
            raise RequestError(
                f"--{name.replace('_', '-')} needs --prompts-file: without prompts, nothing is "
                "generated"
            )
    return []


def _texts(
    arguments: argparse.Namespace,
    model: Model,
    draft_model: Model | None,
    given: Sequence[Prompt],
) -> list[Continued]:
    from neo_runtime import DraftModel, GenerationOptions, PromptLookup
    from neo_runtime.text.prompts import of_each, prompt_ids

    from neo_tools.drafts.measure import texts
    from neo_tools.drafts.report import continued

    new = arguments.new_tokens or _NEW_TOKENS
    options = GenerationOptions(max_new_tokens=new)

    def ids_of(prompt: Prompt) -> Any:
        ids = prompt_ids(prompt, model.manifest.model.vocab_size, model.tokenizer)
        ids = ids[: arguments.prompt_tokens]
        options.total_length(len(ids), model.manifest.max_length)
        return ids

    prompts = of_each(given, ids_of)
    least = arguments.prompt_tokens or 1
    prompts = [ids for ids in prompts if len(ids) >= least][: arguments.prompts]
    if not prompts:
        raise RequestError(f"no prompt has {least} tokens or more; lower --prompt-tokens")
    limit = arguments.draft_tokens or _DRAFT_TOKENS
    drafters: dict[str, Any] = {"prompt lookup": PromptLookup(limit)}
    if draft_model is not None:
        drafters["draft model"] = DraftModel(draft_model, limit)
    return continued(texts(model, prompts, new, drafters, arguments.repetitions, _progress))


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog=_PROGRAM, description=neo_tools.drafts.__doc__)
    parser.add_argument(
        "bundle", metavar="BUNDLE", type=Path, help="a folder written by neo-export"
    )
    parser.add_argument(
        "--draft-model", metavar="BUNDLE", type=Path, help="also measure a small model that drafts"
    )
    parser.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="prompts, in the format of neo-generate; without it, only verification is measured",
    )
    # The defaults are filled in later: so `_given` can tell which were given without prompts.
    for name, least, text in (
        ("--prompts", 1, "use only the first N prompts (default: all)"),
        ("--prompt-tokens", 1, "cut prompts to N tokens, and skip shorter ones"),
        ("--draft-tokens", 1, f"most tokens of a draft (default: {_DRAFT_TOKENS})"),
        ("--new-tokens", 2, f"new tokens for each prompt (default: {_NEW_TOKENS})"),
    ):
        parser.add_argument(name, metavar="N", type=at_least(least), help=text)
    parser.add_argument(
        "-d",
        "--depth",
        metavar="N",
        type=at_least(2),
        default=128,
        help="tokens in the cache before those that are verified (default: 128)",
    )
    add_numbers(parser, ("-r", "--repetitions", 5, "rounds"))
    parser.add_argument(
        "--keep-prepacked",
        action="store_true",
        help="keep prepacked weights also of float32 bundles, and use them",
    )
    add_running(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
