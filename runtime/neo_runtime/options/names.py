"""The names of generation options in a call, and pairs of names for the same limit."""

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
"""Names from other libraries that are not options here, each with advice for the message."""


def named_changes(overrides: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The overrides of a call under the options' own names.

    The rival of an option that is given (`max_length` for `max_new_tokens`) becomes None.

    Raises:
        RequestError: a name is unknown, or one option is given by two names.
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
