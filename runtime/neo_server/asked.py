"""Parsing and validation of the JSON body of `POST /v1/completions`.

Names, meanings and defaults are those of OpenAI's API. Fields that it lacks have the names of
`GenerationOptions`, or are vLLM's: `min_tokens`, `top_k=-1`, `stop_token_ids`,
`truncate_prompt_tokens`, `structured_outputs` and `return_tokens_as_token_ids`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neo_server.errors import bad_request
from neo_server.forms import Form, asked_form

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Asked", "read_request", "refuse_alternatives"]

_MOST_CONTINUATIONS = 128
_MOST_LOGPROBS = 20
_MOST_TOKENS = 1_000_000
_MOST_POSITIONS = 2048
"""Positions of the published GPT-Neo models. A `max_tokens` beyond the model's own positions is
refused elsewhere, so the limit on log probabilities counts at most this many tokens."""
_MOST_STOPS, _MOST_CHARACTERS = 16, 1000
_MOST_ENTRIES = 4096
"""Most entries of an option that is a list or an object, nested ones included; each costs time at
every step."""
_DEEPEST = 8
"""Most levels of nested lists in an option; deeper ones are refused as too long."""
_MOST_ALTERNATIVES = 500_000
"""Most log probabilities in an answer: about 10 MB of JSON."""
_SAMPLING = ("top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Fields that have no effect at temperature 0."""
_PASSED = (
    "stop",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "sequence_bias",
    "eos_token_id",
    "ignore_eos",
)
"""Fields passed to `Scheduler.submit` under the same name."""
_NEUTRAL = {
    "add_special_tokens": True,
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "use_beam_search": False,
}
"""Fields of vLLM, each with the only value that is supported: the one that describes what this
server does anyway."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One validated request."""

    model: str | None
    prompts: tuple[str | list[int], ...]
    n: int
    """Continuations returned for each prompt."""
    best_of: int
    """Continuations computed for each prompt; the `n` best are returned."""
    max_tokens: int
    echo: bool
    logprobs: int | None
    stream: bool
    include_usage: bool
    as_token_ids: bool
    """Whether tokens are named "token_id:123" in log probabilities."""
    form: Form | None
    """Constraint on the text; None: unconstrained."""
    truncate_prompt_tokens: int | None
    """Keep only this many tokens at the end of each prompt; -1: as many as fit; None: all."""
    stop_token_ids: tuple[int, ...]
    """Token ids that end the text, in addition to end of sequence."""
    options: Mapping[str, Any]
    """Options of `Scheduler.submit`."""

    @property
    def sequences(self) -> int:
        """Continuations computed for all prompts together."""
        return len(self.prompts) * self.best_of


class _Fields:
    """The fields of a request that have not been read yet. A null field counts as absent."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in body.items() if value is not None}

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def get(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def peek(self, name: str) -> Any:
        return self._left.get(name)

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise bad_request(f"{name} is {value!r}, expected true or false", name)
        return value

    def count(self, name: str, default: int, least: int, most: int | None = None) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise bad_request(f"{name} is {value!r}, expected an integer of at least {least}", name)
        if most is not None and value > most:
            raise bad_request(f"{name} is {value}, expected at most {most}", name)
        return value

    def optional_count(self, name: str, least: int, most: int | None = None) -> int | None:
        return self.count(name, least, least, most) if name in self else None

    def refuse_rest(self) -> None:
        if self._left:
            names = ", ".join(sorted(self._left))
            raise bad_request(
                f"unknown fields in the request: {names}; remove them", sorted(self._left)[0]
            )


def read_request(body: object) -> Asked:
    """Parse and validate the fields of a request, except the values of most options.

    `Scheduler.submit` validates those values.

    Args:
        body: the parsed JSON.

    Raises:
        ApiError: (400) a field is unknown or has an invalid value; the message names it.
    """
    if not isinstance(body, dict):
        raise bad_request("the request's body is not a JSON object; send a prompt in one")
    fields = _Fields(body)
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise bad_request(f"model is {model!r}, expected a name (a string)", "model")
    n = fields.count("n", 1, 1, _MOST_CONTINUATIONS)
    best_of = fields.count("best_of", n, n, _MOST_CONTINUATIONS)
    asked = Asked(
        model=model,
        prompts=_prompts(fields.get("prompt")),
        n=n,
        best_of=best_of,
        max_tokens=fields.count("max_tokens", 16, 0, _MOST_TOKENS),
        echo=fields.flag("echo"),
        logprobs=fields.optional_count("logprobs", 0, _MOST_LOGPROBS),
        stream=fields.flag("stream"),
        include_usage=_include_usage(fields.get("stream_options", {})),
        as_token_ids=fields.flag("return_tokens_as_token_ids"),
        form=asked_form(fields.get("structured_outputs"), fields.get("response_format")),
        truncate_prompt_tokens=_truncation(fields),
        stop_token_ids=_stop_token_ids(fields.get("stop_token_ids", [])),
        options=_options(fields),
    )
    fields.get("user")
    for name, value in _NEUTRAL.items():
        if fields.get(name, value) is not value:
            said = str(value).lower()
            raise bad_request(f"{name} must be {said} on this server; leave it out", name)
    if fields.get("suffix"):
        raise bad_request("GPT-Neo cannot insert text before a suffix; leave suffix out", "suffix")
    fields.refuse_rest()
    # A first check, before tokenization: a text counts as one token. `encoded` checks again.
    refuse_alternatives(asked, [1 if isinstance(one, str) else len(one) for one in asked.prompts])
    if asked.stream and asked.best_of > asked.n:
        raise bad_request(
            "best_of cannot be used with stream, as it compares whole texts; leave one out",
            "best_of",
        )
    return asked


def refuse_alternatives(asked: Asked, lengths: Sequence[int]) -> None:
    """Refuse a request whose answer could have too many log probabilities.

    Args:
        asked: the request.
        lengths: tokens of each prompt; they count if the prompts are echoed.

    Raises:
        ApiError: (400) more than 500,000 log probabilities.
    """
    if asked.logprobs is None:
        return
    prompts = sum(lengths) if asked.echo else 0
    tokens = asked.n * (prompts + len(asked.prompts) * min(asked.max_tokens, _MOST_POSITIONS))
    if tokens * (asked.logprobs + 1) > _MOST_ALTERNATIVES:
        raise bad_request(
            f"the answer may have {tokens} tokens with {asked.logprobs + 1} log probabilities "
            f"each, expected at most {_MOST_ALTERNATIVES} in all; ask for fewer prompts, "
            "continuations, tokens or logprobs",
            "logprobs",
        )


def _prompts(given: object) -> tuple[str | list[int], ...]:
    if isinstance(given, str):
        return (given,)
    if isinstance(given, list) and given:
        if all(_is_id(item) for item in given):
            return (given,)
        if all(isinstance(item, str) for item in given):
            return tuple(given)
        if all(isinstance(item, list) and all(_is_id(i) for i in item) for item in given):
            return tuple(given)
    raise bad_request(
        "prompt is missing, empty, or of the wrong type; expected a text, a list of token ids, a "
        "list of texts, or a list of lists of token ids",
        "prompt",
    )


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _stop_token_ids(given: object) -> tuple[int, ...]:
    if not isinstance(given, list) or not all(_is_id(item) and item >= 0 for item in given):
        raise bad_request(
            f"stop_token_ids is {given!r:.200}, expected a list of token ids", "stop_token_ids"
        )
    if len(given) > _MOST_ENTRIES:
        raise bad_request(
            f"stop_token_ids has more than {_MOST_ENTRIES} entries; give fewer", "stop_token_ids"
        )
    return tuple(given)


def _truncation(fields: _Fields) -> int | None:
    """Read vLLM's `truncate_prompt_tokens`: -1, or at least 1."""
    if fields.peek("truncate_prompt_tokens") == -1:
        return int(fields.get("truncate_prompt_tokens"))
    return fields.optional_count("truncate_prompt_tokens", 1, _MOST_TOKENS)


def _include_usage(given: object) -> bool:
    """Read `stream_options`. `include_obfuscation` is ignored: no client depends on it."""
    known = {"include_usage", "include_obfuscation", "continuous_usage_stats"}
    if not isinstance(given, dict) or given.keys() - known:
        raise bad_request(
            f'stream_options is {given!r}, expected {{"include_usage": true}}', "stream_options"
        )
    if given.get("continuous_usage_stats"):
        raise bad_request(
            "continuous_usage_stats is not supported; use include_usage", "stream_options"
        )
    include = given.get("include_usage") or False
    if not isinstance(include, bool):
        raise bad_request(f"include_usage is {include!r}, expected true or false", "stream_options")
    return include


def _options(fields: _Fields) -> dict[str, Any]:
    """Options of `Scheduler.submit`.

    OpenAI's defaults apply, even if the bundle's generation_config.json sets these options.
    """
    options: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1}
    options |= {"stop": (), "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}}
    temperature = fields.get("temperature", 1)
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not is_number or not temperature >= 0:  # also true of NaN
        raise bad_request(
            f"temperature is {temperature!r}, expected a number of at least 0", "temperature"
        )
    sampling = {"top_p": 1.0, "top_k": 0} | _given(fields, _SAMPLING)
    if sampling["top_k"] == -1:
        sampling["top_k"] = 0
    options["do_sample"] = temperature > 0
    if temperature > 0:
        options |= {"temperature": temperature, **sampling}
    options |= _given(fields, _PASSED)
    _refuse_long(options)
    options["min_new_tokens"] = fields.count("min_tokens", 0, 0, _MOST_TOKENS)
    seed = fields.optional_count("seed", -(2**63))
    return options | {"seed": None if seed is None else seed % 2**64}


def _refuse_long(options: Mapping[str, Any]) -> None:
    """Raises ApiError for options so long that they would slow down every other request."""
    given = options.get("stop")
    stops = given if isinstance(given, list) else [given]
    if len(stops) > _MOST_STOPS:
        raise bad_request(f"stop has {len(stops)} strings, expected at most {_MOST_STOPS}", "stop")
    if any(isinstance(stop, str) and len(stop) > _MOST_CHARACTERS for stop in stops):
        raise bad_request(f"stop has more than {_MOST_CHARACTERS} characters; shorten it", "stop")
    for name, value in options.items():
        if _entries(value) > _MOST_ENTRIES:
            raise bad_request(f"{name} has more than {_MOST_ENTRIES} entries; give fewer", name)


def _entries(value: object, depth: int = 0) -> int:
    """Entries of a list or an object, nested ones included.

    A string counts as one entry, plus one for each 100 characters. What is nested deeper than
    `_DEEPEST` counts as too many.
    """
    if isinstance(value, str):
        return 1 + len(value) // 100
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return 1
    if depth == _DEEPEST:
        return _MOST_ENTRIES + 1
    return sum(_entries(item, depth + 1) for item in value)


def _given(fields: _Fields, names: tuple[str, ...]) -> dict[str, Any]:
    found = {name: fields.get(name) for name in names}
    return {name: value for name, value in found.items() if value is not None}
