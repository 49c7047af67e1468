"""`neo-generate BUNDLE [PROMPT]`: continue a prompt and print the text as it is generated."""

from __future__ import annotations

import sys
from contextlib import closing, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any

from neo_runtime.command.command_line import OneLineParser, add_version, run_command
from neo_runtime.command.form import add_form_flags, given_form
from neo_runtime.command.loading import add_loading_flags, loading
from neo_runtime.command.many_prompts import completed
from neo_runtime.command.options import add_option_flags, chosen_options
from neo_runtime.command.output import print_lines, print_object, print_text, print_timings
from neo_runtime.command.prompts import read_prompts, read_text, shortened
from neo_runtime.errors import RequestError
from neo_runtime.options.values import count

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from neo_runtime.command.prompts import GivenPrompt
    from neo_runtime.generation.completion import Completion
    from neo_runtime.generation.drafting import Drafter
    from neo_runtime.generation.prefix import Prefix
    from neo_runtime.generation.text_stream import TextStream
    from neo_runtime.model import Model
    from neo_runtime.options.generation_options import GenerationOptions
    from neo_runtime.text.prompts import Prompt

__all__ = ["main"]

_BAD_MODEL = 1
_EPILOG = """Without PROMPT the prompt is read from standard input, without its last newline.
Option defaults come from the bundle's generation_config.json, unless --no-generation-config leaves
it out. Several completions are separated by a line "---".

exit status: 0 done; 1 the model's logits hold NaN or infinity; 2 wrong usage, or a bundle or
request that cannot be served; 130 interrupted; 141 the reader of the output has gone"""


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="neo-generate",
        usage="%(prog)s [options] BUNDLE [PROMPT]",
        description="Continue a prompt with the model of a bundle.",
        epilog=_EPILOG,
    )
    add_version(parser)
    # Both may stand after `--`, which argparse does not see: see `_parsed`.
    parser.add_argument(
        "bundle", metavar="BUNDLE", nargs="?", help="a folder written by neo-export"
    )
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="the prompt (default: standard input)"
    )
    parser.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="a file of prompts instead: JSON lines, each a string, a list of token ids, or an "
        'object with "prompt", "text" or "content", and optionally "id"; - for stdin',
    )
    parser.add_argument(
        "--truncate-prompt-tokens",
        type=int,
        metavar="N",
        help="keep the last N tokens of each prompt; -1: as many as fit beside the new tokens "
        "(default: a prompt that is too long is an error)",
    )
    parser.add_argument(
        "--prefix-file",
        metavar="FILE",
        help="a shared prefix of all prompts, such as examples, computed once; it must not end "
        "inside a word; - for standard input",
    )
    parser.add_argument(
        "--token-ids",
        action="store_true",
        help="PROMPT is a list of token ids such as 1,2,3; print token ids, too",
    )
    parser.add_argument("--echo", action="store_true", help="print the prompt before the text")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    form.add_argument(
        "--json-lines",
        action="store_true",
        help="print one JSON object per completion as soon as it and those before it are done, "
        'with the prompt\'s "index" (from 0) and "id"',
    )
    parser.add_argument("--timings", action="store_true", help="print timings to stderr")
    add_loading_flags(parser)
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="prompts computed together (default: chosen for the machine)",
    )
    drafts = parser.add_mutually_exclusive_group()
    drafts.add_argument(
        "--prompt-lookup",
        action="store_true",
        help="speculative decoding: guess tokens that repeat the text, and verify several at "
        "once; the same text, except at near ties in int8, int4 and half precision",
    )
    drafts.add_argument(
        "--draft-model",
        metavar="BUNDLE",
        help="speculative decoding with a small model of the same vocabulary, on the same backend",
    )
    parser.add_argument(
        "--draft-tokens",
        type=int,
        metavar="N",
        help="guess at most N tokens at a time (default: 10)",
    )
    parser.add_argument(
        "--no-generation-config",
        action="store_true",
        help="ignore the bundle's generation_config.json",
    )
    add_option_flags(parser)
    add_form_flags(parser)
    return parser


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments, in any order; whatever follows the first `--` is not an option."""
    parser, given = _parser(), list(argv)
    end = given.index("--") if "--" in given else len(given)
    # argparse of Python 3.11 forgets `--` where options and the others may mix.
    arguments, unknown = parser.parse_known_intermixed_args(given[:end])
    named = [text for text in (arguments.bundle, arguments.prompt) if text is not None]
    named += given[end + 1 :]
    unknown += named[2:]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if not named:
        parser.error("the following arguments are required: BUNDLE")
    arguments.bundle, arguments.prompt = (*named, None)[:2]
    if arguments.prompt == "-":  # as for files
        arguments.prompt = None
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    return run_command(
        "neo-generate",
        lambda: _run(_parsed(sys.argv[1:] if argv is None else argv)),
        extras="cpu",
        unverified=_BAD_MODEL,
    )


def _check(arguments: argparse.Namespace, options: Mapping[str, Any]) -> None:
    """Refuse arguments that contradict each other, before any file is read.

    Raises:
        RequestError: says what to change.
    """
    if arguments.draft_tokens is not None and not (
        arguments.prompt_lookup or arguments.draft_model
    ):
        raise RequestError("--draft-tokens needs --prompt-lookup or --draft-model; add one of them")
    if arguments.draft_tokens is not None and arguments.draft_tokens < 1:
        raise RequestError(f"--draft-tokens is {arguments.draft_tokens}, expected at least 1")
    if "logprobs" in options and not (arguments.json or arguments.json_lines):
        raise RequestError("--logprobs needs --json or --json-lines; add one of them")
    files = {
        "the prefix": arguments.prefix_file,
        "the JSON schema": arguments.json_schema,
        "the grammar": arguments.lark,
        "the prompts": (arguments.prompts_file or "-") if arguments.prompt is None else None,
    }
    from_input = [what for what, file in files.items() if file == "-"]
    if len(from_input) > 1:
        raise RequestError(
            f"{' and '.join(from_input)} are to come from standard input; give one of them another "
            "place"
        )


def _run(arguments: argparse.Namespace) -> int:
    options = chosen_options(arguments)
    _check(arguments, options)
    count(1, optional=True)("--batch-size", arguments.batch_size)
    if arguments.truncate_prompt_tokens != -1:
        count(1, optional=True)("--truncate-prompt-tokens", arguments.truncate_prompt_tokens)
    prompts = read_prompts(arguments.prompt, arguments.prompts_file, ids=arguments.token_ids)
    form = given_form(arguments)
    beginning = None if arguments.prefix_file is None else read_text(arguments.prefix_file)
    started = perf_counter()
    from neo_runtime.loading import load

    given = loading(arguments)
    small = arguments.draft_model
    with (
        load(arguments.bundle, **given) as model,
        nullcontext() if small is None else load(small, **given) as draft_model,
    ):
        loaded = perf_counter() - started
        if model.backend_choice is not None and model.backend != "cpu":  # else it was logged
            print(f"neo-generate: {model.backend_choice}", file=sys.stderr)
        bad_words = options.pop("bad_words", ())
        options["grammar"] = model.grammar(**form) if form else None
        chosen = _chosen(model, options, reads_file=not arguments.no_generation_config)
        with nullcontext() if beginning is None else model.prefix(beginning) as prefix:
            drafter = _drafter(arguments, draft_model)
            shared = {"bad_words": bad_words, "prefix": prefix, "drafter": drafter}
            if (most := arguments.truncate_prompt_tokens) is not None:
                prompts = shortened(model, prompts, most, chosen, prefix)
            completions = _complete(arguments, model, prompts, chosen, shared, loaded)
    if arguments.timings:
        print_timings(completions, loaded)
    return 0


def _drafter(arguments: argparse.Namespace, draft_model: Model | None) -> Drafter | None:
    """The drafter that the arguments choose; None without one."""
    from neo_runtime.generation.draft_model import DraftModel
    from neo_runtime.generation.drafting import PromptLookup

    tokens = arguments.draft_tokens
    given = {} if tokens is None else {"num_tokens": tokens}
    if draft_model is not None:
        return DraftModel(draft_model, **given)
    return PromptLookup(**given) if arguments.prompt_lookup else None


def _chosen(model: Model, given: dict[str, Any], *, reads_file: bool) -> GenerationOptions:
    """The options of the request."""
    from neo_runtime.options.generation_options import GenerationOptions

    return model.options(**given) if reads_file else GenerationOptions().merged(**given)


def _complete(
    arguments: argparse.Namespace,
    model: Model,
    prompts: Sequence[GivenPrompt],
    chosen: GenerationOptions,
    shared: dict[str, Any],
    loaded: float,
) -> list[Completion]:
    """Compute and print; what the timings are of. `shared`: arguments of all requests."""
    given, size = [prompt for prompt, _ in prompts], arguments.batch_size
    if arguments.json_lines:
        tags = [tag for _, tag in prompts]
        with closing(completed(model, given, chosen, size, **shared)) as done:
            return print_lines(model, tags, done)
    first = given[0]
    if not arguments.token_ids and _can_stream(arguments, model, chosen):
        pieces = model.stream(first, chosen, **shared)
        return [_stream(pieces, echo=_whole(model, first, **shared) if arguments.echo else "")]
    completions = model.generate(given, chosen, batch_size=size, **shared)
    if arguments.json:
        print_object(model, arguments.bundle, completions, loaded)
    else:
        print_text(model, completions, ids=arguments.token_ids, echo=arguments.echo)
    return completions


def _can_stream(arguments: argparse.Namespace, model: Model, chosen: GenerationOptions) -> bool:
    return not (
        arguments.json
        or arguments.prompts_file is not None
        or model.tokenizer is None
        or chosen.num_beams > 1
        or chosen.num_return_sequences > 1
    )


def _whole(model: Model, prompt: Prompt, *, prefix: Prefix | None, **_: Any) -> str:
    assert model.tokenizer is not None  # else nothing is streamed
    before = [] if prefix is None else prefix.ids.tolist()
    if isinstance(prompt, str):
        return model.tokenizer.decode(before, skip_special_tokens=False) + prompt
    return model.tokenizer.decode([*before, *prompt], skip_special_tokens=False)


def _stream(stream: TextStream, *, echo: str) -> Completion:
    with stream as pieces:
        if echo:
            print(echo, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
    return pieces.completion


if __name__ == "__main__":
    sys.exit(main())
