"""`neo-generate BUNDLE [PROMPT]`: continue a prompt and print the text as it is generated."""

from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING, Any

from neo_runtime.cli_options import add_option_flags, chosen_options
from neo_runtime.cli_prompts import read_prompts
from neo_runtime.command_line import OneLineParser, add_version, run_command
from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_runtime.completion import Completion
    from neo_runtime.model import Model
    from neo_runtime.options import GenerationOptions
    from neo_runtime.sampling import Choice
    from neo_runtime.text_stream import TextStream

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
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
        help="several prompts instead: JSON lines, each a string, a list of token ids, or an "
        'object with "prompt", "text" or "content"; - for standard input',
    )
    parser.add_argument(
        "--token-ids",
        action="store_true",
        help="take PROMPT as token ids such as 1,2,3, and print token ids",
    )
    parser.add_argument("--echo", action="store_true", help="print the prompt before the text")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--timings", action="store_true", help="print timings to stderr")
    parser.add_argument(
        "--backend",
        choices=("auto", "cpu", "cuda", "tensorrt"),
        default="auto",
        help="what runs the bundle (default: auto, the GPU that it was exported for if that can be "
        "used, else the CPU)",
    )
    parser.add_argument(
        "--device", type=int, default=0, metavar="N", help="index of the GPU (default: 0)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads per operator (default: physical cores)"
    )
    parser.add_argument(
        "--max-cache-mb",
        type=int,
        metavar="MB",
        help="limit of the key/value cache in 10^6 bytes (default: none)",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="prompts to compute together (default: all)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare the weights with their checksum first"
    )
    parser.add_argument(
        "--no-generation-config",
        action="store_true",
        help="take nothing from the bundle's generation_config.json",
    )
    add_option_flags(parser)
    return parser


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, in any order; nothing after the first `--` is an option."""
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
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    return run_command(
        "neo-generate",
        lambda: _run(_parsed(sys.argv[1:] if argv is None else argv)),
        extras="cpu",
        unverified=_BAD_MODEL,
    )


def _run(arguments: argparse.Namespace) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    options = chosen_options(arguments)
    if "logprobs" in options and not arguments.json:
        raise RequestError("--logprobs needs --json; add it")
    prompts = read_prompts(arguments.prompt, arguments.prompts_file, ids=arguments.token_ids)
    import neo_runtime

    started = perf_counter()
    limit = arguments.max_cache_mb
    with neo_runtime.load(
        arguments.bundle,
        backend=arguments.backend,
        device=arguments.device,
        threads=arguments.threads,
        max_cache_bytes=None if limit is None else limit * 10**6,
        verify=arguments.verify,
    ) as model:
        loaded = perf_counter() - started
        if model.backend_choice is not None and model.backend != "cpu":  # else it was logged
            print(f"neo-generate: {model.backend_choice}", file=sys.stderr)
        bad_words = options.pop("bad_words", ())
        chosen = _chosen(model, options, reads_file=not arguments.no_generation_config)
        first = prompts[0]
        if isinstance(first, str) and _can_stream(arguments, model, chosen):
            pieces = model.stream(first, chosen, bad_words=bad_words)
            completions = [_stream(pieces, echo=first if arguments.echo else "")]
        else:
            completions = model.generate(
                prompts, chosen, bad_words=bad_words, batch_size=arguments.batch_size
            )
            _print(arguments, model, completions, loaded)
    if arguments.timings:
        _print_timings(completions, loaded)
    return 0


def _chosen(model: Model, given: dict[str, Any], *, reads_file: bool) -> GenerationOptions:
    """The options of the request; without the file, the model's own end-of-sequence stays."""
    from neo_runtime.options import GenerationOptions

    if reads_file:
        return model.options(**given)
    eos = tuple(token for token in model.manifest.model.eos_token_id if token >= 0)
    return GenerationOptions(eos_token_id=eos).merged(**given)


def _can_stream(arguments: argparse.Namespace, model: Model, chosen: GenerationOptions) -> bool:
    return not (
        arguments.json
        or arguments.prompts_file is not None
        or model.tokenizer is None
        or chosen.num_beams > 1
        or chosen.num_return_sequences > 1
    )


def _stream(stream: TextStream, *, echo: str) -> Completion:
    with stream as pieces:
        if echo:
            print(echo, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
    return pieces.completion


def _print(
    arguments: argparse.Namespace, model: Model, completions: Sequence[Completion], loaded: float
) -> None:
    if arguments.json:
        report = {
            "bundle": arguments.bundle,
            "load_seconds": loaded,
            "completions": [_facts(model, completion) for completion in completions],
        }
        print(json.dumps(report, indent=1, ensure_ascii=False))
        return
    for index, completion in enumerate(completions):
        if index:
            print("---")
        prompt_ids = completion.prompt_token_ids
        if arguments.token_ids or model.tokenizer is None:
            ids = (*prompt_ids, *completion.token_ids) if arguments.echo else completion.token_ids
            print(",".join(map(str, ids)))
        else:
            print(model.tokenizer.decode(prompt_ids) if arguments.echo else "", end="")
            print(completion.text)


def _facts(model: Model, completion: Completion) -> dict[str, Any]:
    facts = asdict(completion)
    if completion.logprobs is not None:
        facts["logprobs"] = [_choice(model, choice) for choice in completion.logprobs]
    return facts


def _choice(model: Model, choice: Choice) -> dict[str, Any]:
    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = model.tokenizer.token(token) if model.tokenizer else None
        return {"token": token, "text": text, "logprob": logprob}

    best = [entry(*other) for other in choice.top_logprobs or ()]
    return entry(choice.token, choice.logprob) | {"top_logprobs": best}


def _print_timings(completions: Sequence[Completion], loaded: float) -> None:
    print(f"load {loaded:.3f} s", file=sys.stderr)
    for completion in completions:
        times = completion.timings
        print(
            f"prompt of {len(completion.prompt_token_ids)} tokens: prefill "
            f"{times.prefill_seconds:.3f} s; {len(completion.token_ids)} tokens, "
            f"{times.tokens_per_second:.1f} a second",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
