"""The flags of `neo-generate` that set generation options: every field of `GenerationOptions`."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from neo_runtime.options.generation_options import DEFAULT_MAX_NEW_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["add_option_flags", "chosen_options", "token_ids"]


def token_ids(text: str) -> list[int]:
    """Parse a list of token ids, such as `1,2,3`."""
    return [int(part) for part in re.split(r"\s*,\s*|\s+", text.strip())]


def _early_stopping(text: str) -> bool | str:
    values: dict[str, bool | str] = {"false": False, "true": True, "never": "never"}
    return values.get(text, text)


def _biased_token(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    return int(token), float(bias)


def _biased_sequence(text: str) -> tuple[tuple[int, ...], float]:
    ids, _, bias = text.partition("=")
    return tuple(token_ids(ids)), float(bias)


def _decay(text: str) -> tuple[int, float]:
    start, _, factor = text.partition(",")
    return int(start), float(factor)


# Names that argparse uses in "invalid … value".
for _function, _name in (
    (token_ids, "token ids, such as 1,2,3"),
    (_biased_token, "ID=BIAS"),
    (_biased_sequence, "IDS=BIAS"),
    (_decay, "START,FACTOR"),
):
    _function.__name__ = _name

_Flag = tuple[str, "Callable[[str], Any]", str, str]
"""Name, parser of its value, metavar, help."""

_LENGTH: tuple[_Flag, ...] = (
    (
        "max-new-tokens",
        int,
        "N",
        f"generate at most N tokens (default: {DEFAULT_MAX_NEW_TOKENS}, or as many as the model "
        "has positions left)",
    ),
    ("max-length", int, "N", "at most N tokens, prompt included"),
    ("min-new-tokens", int, "N", "generate at least N tokens before end of sequence"),
    ("min-length", int, "N", "the same, prompt included"),
    ("eos-token-id", token_ids, "IDS", "end-of-sequence ids (default: the model's)"),
    (
        "exponential-decay-length-penalty",
        _decay,
        "START,FACTOR",
        "after START new tokens end of sequence becomes more probable at each step",
    ),
    (
        "forced-eos-token-id",
        token_ids,
        "IDS",
        "ids allowed for the last token before the length limit",
    ),
)
_SAMPLING: tuple[_Flag, ...] = (
    ("seed", int, "N", "seed of the draws; the same seed gives the same text"),
    ("temperature", float, "X", "divide the logits by X"),
    ("top-k", int, "K", "keep the K most probable tokens (default: 50; 0: all)"),
    ("top-p", float, "P", "keep the fewest most probable tokens whose probabilities sum to P"),
    ("min-p", float, "P", "keep tokens of at least P times the largest probability"),
    ("typical-p", float, "P", "keep the most typical tokens whose probabilities sum to P"),
    ("epsilon-cutoff", float, "P", "keep tokens of at least this probability"),
    ("eta-cutoff", float, "P", "the same, with a lower limit for flat distributions"),
    ("num-return-sequences", int, "N", "continuations per prompt (default: 1)"),
)
_PENALTIES: tuple[_Flag, ...] = (
    (
        "repetition-penalty",
        float,
        "X",
        "above 1: tokens of prompt and continuation become less probable",
    ),
    (
        "presence-penalty",
        float,
        "X",
        "OpenAI's: subtract X from the logit of each token generated so far",
    ),
    (
        "frequency-penalty",
        float,
        "X",
        "OpenAI's: subtract X once per time that the token was generated",
    ),
    ("no-repeat-ngram-size", int, "N", "no n-gram of N tokens appears twice"),
    ("suppress-tokens", token_ids, "IDS", "ids that are never generated"),
    ("begin-suppress-tokens", token_ids, "IDS", "ids that are not generated first"),
)
_BEAMS: tuple[_Flag, ...] = (
    ("num-beams", int, "N", "above 1: beam search (default: 1)"),
    ("length-penalty", float, "X", "divide scores by new tokens ** X (default: 1)"),
    (
        "early-stopping",
        _early_stopping,
        "WHEN",
        "end at N finished beams (true), when a better one is unlikely (false) or "
        "impossible (never) (default: false)",
    ),
)
_REPEATED: tuple[_Flag, ...] = (
    ("stop", str, "TEXT", "end the text before TEXT; may be repeated"),
    ("bad-words", str, "WORD", "a word that must not appear; may be repeated"),
    ("bad-words-ids", token_ids, "IDS", "a sequence of ids that must not appear; may be repeated"),
    ("logit-bias", _biased_token, "ID=BIAS", "add BIAS to the logit of token ID; may be repeated"),
    (
        "sequence-bias",
        _biased_sequence,
        "IDS=BIAS",
        "add BIAS to the logit of the last id when the ids before it were just generated; may be "
        "repeated",
    ),
)
_SWITCHES = (
    ("do-sample", "draw each token; otherwise take the most probable one"),
    ("ignore-eos", "continue past end of sequence"),
    ("renormalize-logits", "apply log-softmax after all other rules"),
    ("remove-invalid-values", "replace NaN by 0 and infinities by the largest float32 numbers"),
)


def add_option_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags; a flag that is not given sets no attribute of the parsed arguments."""
    for title, flags in (
        ("length", _LENGTH),
        ("sampling", _SAMPLING),
        ("penalties and bans", _PENALTIES),
        ("beam search", _BEAMS),
    ):
        group = parser.add_argument_group(title)
        for name, kind, metavar, text in flags:
            group.add_argument(
                f"--{name}", type=kind, metavar=metavar, help=text, default=argparse.SUPPRESS
            )
    group = parser.add_argument_group("text, ids and switches")
    for name, kind, metavar, text in _REPEATED:
        group.add_argument(
            f"--{name}",
            type=kind,
            metavar=metavar,
            help=text,
            action="append",
            default=argparse.SUPPRESS,
        )
    for name, text in _SWITCHES:
        group.add_argument(
            f"--{name}",
            help=text,
            action=argparse.BooleanOptionalAction,
            default=argparse.SUPPRESS,
        )
    group.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="with --json or --json-lines: log probabilities of each token and of the N best",
    )


def chosen_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `Model.generate`, from the flags that were given."""
    flags = (*_LENGTH, *_SAMPLING, *_PENALTIES, *_BEAMS, *_REPEATED)
    names = [flag[0] for flag in flags] + [switch[0] for switch in _SWITCHES] + ["logprobs"]
    given = vars(arguments)
    chosen = {name: given[name] for name in (n.replace("-", "_") for n in names) if name in given}
    if "logit_bias" in chosen:
        chosen["logit_bias"] = dict(chosen["logit_bias"])
    return chosen
