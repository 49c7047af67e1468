"""The names that generation options go by in a call, and which of them stand for one limit."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = ["ALIASES", "named_changes"]

ALIASES = {"stop_strings": "stop"}
# Setting one of a pair in a call means that the other one, from a file, no longer holds.
_RIVALS = {
    "max_new_tokens": "max_length",
    "max_length": "max_new_tokens",
    "min_new_tokens": "min_length",
    "min_length": "min_new_tokens",
}


_LOGPROBS = "log probabilities come with logprobs=0; leave it out"
_ELSEWHERE = {
    "output_logits": _LOGPROBS,
    "output_scores": _LOGPROBS,
    "pad_token_id": "nothing is padded with tokens; leave it out",
    "return_dict_in_generate": "there is always a Completion; leave it out",
    "use_cache": "there is always a cache; leave it out",
    "assistant_model": "it is drafter=neo_runtime.DraftModel(…) here",
    "drafter": "only generate and stream take one",
    "prompt_lookup_num_tokens": "it is drafter=neo_runtime.PromptLookup(…) here",
}
"""What is no option, by the names under which it may be looked for."""


def named_changes(overrides: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """What a call replaces, by the options' names; rivals of what it gives are None.

    Raises:
        RequestError: an unknown name, or two names of one option.
    """
    changes: dict[str, Any] = {}
    for given, value in overrides.items():
        name = ALIASES.get(given, given)
        if name not in known:
            close = difflib.get_close_matches(given, [*known, *ALIASES], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            hint = _ELSEWHERE.get(given, hint)
            raise RequestError(f"unknown generation option {given!r}; {hint}")
        if name in changes:
            raise RequestError(f"{given!r} is another name of {name!r}; give one of them")
        changes[name] = value
    for name, rival in _RIVALS.items():
        if changes.get(name) is not None:
            changes.setdefault(rival, None)
    return changes
