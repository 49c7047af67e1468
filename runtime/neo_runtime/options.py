"""The options of one generation, with the names and defaults of Hugging Face `generate`.

`GenerationOptions` is complete and consistent once it exists: every value was checked, and so
was every contradiction between two of them. A bundle's `generation_config.json` gives the
defaults (`from_generation_config`), a call overrides some of them (`merged`).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from neo_runtime import option_values as values
from neo_runtime.errors import ContextLengthError, RequestError
from neo_runtime.generation_config import supported_entries
from neo_runtime.option_values import option

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DEFAULT_MAX_NEW_TOKENS", "GenerationOptions"]

DEFAULT_MAX_NEW_TOKENS = 256
"""Where neither `max_new_tokens` nor `max_length` is given: what the text-generation pipeline of
transformers uses. (`generate` itself takes 20, with a warning that nobody wants 20.)"""

# Setting one of a pair in a call means that the other one, from a file, no longer holds.
_RIVALS = {
    "max_new_tokens": "max_length",
    "max_length": "max_new_tokens",
    "min_new_tokens": "min_length",
    "min_length": "min_new_tokens",
}
_ALIASES = {"stop_strings": "stop"}


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to continue a prompt. Values may be given in any usual form (lists, numpy numbers).

    `None` for an option that has no such value stands for its default, which changes nothing.

    Raises:
        RequestError: a value out of its range, or two options that contradict each other.
    """

    max_new_tokens: int | None = option(None, values.count(1, optional=True))
    """Tokens to generate at most. Wins over `max_length`. Without either:
    `DEFAULT_MAX_NEW_TOKENS`, or as many as the model has positions left."""
    max_length: int | None = option(None, values.count(1, optional=True))
    """Prompt and continuation together, in tokens."""
    min_new_tokens: int | None = option(None, values.count(0, optional=True))
    """End-of-sequence tokens are forbidden before. Wins over `min_length`."""
    min_length: int = option(0, values.count(0))
    """The same, counting the prompt."""
    eos_token_id: tuple[int, ...] = option((), values.token_ids)
    """A continuation ends with the first of these."""
    ignore_eos: bool = option(False, values.flag)
    """Take `eos_token_id` as empty: go on until another limit."""
    stop: tuple[str, ...] = option((), values.strings)
    """The text ends before the first of these strings (`stop_strings` in transformers). Special
    tokens are no text: `eos_token_id` ends at those."""

    do_sample: bool = option(False, values.flag)
    """Draw each token; otherwise take the most probable one."""
    seed: int | tuple[int, ...] | None = option(None, values.seeds)
    """None: new randomness each time. A sequence has one seed a prompt."""
    num_return_sequences: int = option(1, values.count(1))
    """Continuations of each prompt."""
    num_beams: int = option(1, values.count(1))
    """Above 1: beam search, without sampling."""
    length_penalty: float = option(1.0, values.number(minimum=-10, maximum=10), needs="num_beams")
    """A hypothesis' score is its log probability / (its new tokens ** length_penalty)."""
    early_stopping: Literal[False, True, "never"] = option(
        False, values.choice(False, True, "never"), needs="num_beams"
    )
    """When beam search ends: at `num_beams` finished hypotheses (True), once a better one is
    unlikely (False), or once it is impossible ("never")."""

    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = option((), values.sequence_bias)
    """((token ids, bias), …): added to the last id's logit where the others come before it."""
    repetition_penalty: float = option(1.0, values.number(above=0))
    """Above 1: tokens of the prompt and the continuation become less probable."""
    no_repeat_ngram_size: int = option(0, values.count(0))
    """Above 0: no n-gram of this size appears twice."""
    bad_words_ids: tuple[tuple[int, ...], ...] = option((), values.token_sequences)
    """Sequences of ids that must not appear."""
    forced_eos_token_id: tuple[int, ...] = option((), values.token_ids)
    """What the last token is where the length limit is reached."""
    remove_invalid_values: bool = option(False, values.flag)
    """Replace NaN by 0 and infinities by the largest float32 numbers."""
    exponential_decay_length_penalty: tuple[int, float] | None = option(
        None, values.exponential_decay
    )
    """(start, factor): after `start` new tokens end-of-sequence gets more probable each step."""
    suppress_tokens: tuple[int, ...] = option((), values.token_ids)
    """Ids that are never generated."""
    begin_suppress_tokens: tuple[int, ...] = option((), values.token_ids)
    """Ids that are not generated first."""
    presence_penalty: float = option(0.0, values.number())
    """OpenAI's: subtracted once from the logit of every token generated so far."""
    frequency_penalty: float = option(0.0, values.number())
    """OpenAI's: subtracted as many times as the token was generated so far."""
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, metadata={"check": values.token_bias, "needs": None}
    )
    """OpenAI's: token id → addition to its logit."""

    temperature: float = option(
        1.0,
        values.number(above=0, hint="for greedy decoding set do_sample=False"),
        needs="do_sample",
    )
    """Logits are divided by it."""
    top_k: int | None = option(50, values.count(0, optional=True), needs="do_sample")
    """Keep the k most probable tokens. 50 as in transformers; 0 or None: all."""
    top_p: float = option(1.0, values.number(minimum=0, maximum=1), needs="do_sample")
    """Keep the smallest set of most probable tokens whose probabilities reach it together."""
    min_p: float | None = option(
        None, values.number(minimum=0, maximum=1, optional=True), needs="do_sample"
    )
    """Keep tokens of at least this fraction of the largest probability."""
    typical_p: float = option(1.0, values.number(above=0, maximum=1), needs="do_sample")
    """Keep the most typical tokens whose probabilities reach it together (arXiv 2202.00666)."""
    epsilon_cutoff: float = option(0.0, values.number(minimum=0, below=1), needs="do_sample")
    """Keep tokens of at least this probability."""
    eta_cutoff: float = option(0.0, values.number(minimum=0, below=1), needs="do_sample")
    """The same with a limit that falls with the entropy (arXiv 2210.15191)."""
    renormalize_logits: bool = option(False, values.flag)
    """Log-softmax of what all the rules left: matters to the scores of beam search."""

    logprobs: int | None = option(None, values.count(0, optional=True))
    """Report the log probability of each token, and of this many most probable ones."""

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if value is None and spec.name != "top_k":  # whose None means off, like 0
                value = {} if spec.name == "logit_bias" else spec.default
            object.__setattr__(self, spec.name, spec.metadata["check"](spec.name, value))
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if self.num_beams > 1 and self.do_sample:
            raise RequestError(
                f"num_beams is {self.num_beams} and do_sample is True, but beam search here does "
                "not sample; set do_sample=False or num_beams=1"
            )
        if self.num_beams > 1 and self.logprobs is not None:
            raise RequestError(
                f"logprobs is {self.logprobs} and num_beams is {self.num_beams}, but beam search "
                "reports a score a sequence only; set logprobs=None or num_beams=1"
            )
        if self.num_beams == 1 and self.num_return_sequences > 1 and not self.do_sample:
            raise RequestError(
                f"num_return_sequences is {self.num_return_sequences}, but greedy decoding has "
                "one result; set do_sample=True, or num_beams to at least that number"
            )
        if 1 < self.num_beams < self.num_return_sequences:
            raise RequestError(
                f"num_return_sequences is {self.num_return_sequences}, expected at most "
                f"num_beams ({self.num_beams}); lower the one or raise the other"
            )
        for low, high in (("min_new_tokens", "max_new_tokens"), ("min_length", "max_length")):
            least, most = getattr(self, low), getattr(self, high)
            overridden = low == "min_length" and (
                self.min_new_tokens is not None or self.max_new_tokens is not None
            )
            if least is not None and most is not None and least > most and not overridden:
                raise RequestError(
                    f"{low} is {least} and {high} is {most}; set {low} to at most {most}"
                )
        forced = set(self.forced_eos_token_id)
        if forced and forced <= set(self.suppress_tokens):
            raise RequestError(
                f"forced_eos_token_id {sorted(forced)} is suppressed by suppress_tokens, so that "
                "no token would be left at the end; remove one of the two"
            )

    @classmethod
    def from_generation_config(
        cls,
        config: Mapping[str, Any],
        *,
        eos_token_id: tuple[int, ...] = (),
        model_max_length: int | None = None,
    ) -> GenerationOptions:
        """The defaults that a Hugging Face `generation_config.json` gives.

        Args:
            config: the parsed file; an entry of null counts as absent.
            eos_token_id: the model's own, for a file that names none.
            model_max_length: positions that the bundle has: a larger `max_length` of the file is
                lowered to it.

        Raises:
            RequestError: a bad value, or an entry that would change the result and is not
                supported (the message names it).
        """
        entries = supported_entries(config, {spec.name for spec in fields(cls)}, _ALIASES)
        entries.setdefault("eos_token_id", eos_token_id)
        limit = entries.get("max_length")
        if model_max_length is not None and isinstance(limit, int) and limit > model_max_length:
            entries["max_length"] = model_max_length
        return cls(**entries)

    def merged(self, **overrides: Any) -> GenerationOptions:
        """These options with some replaced, as a call with keyword arguments does.

        `max_new_tokens` given here replaces a `max_length` of the defaults, and the other way
        round; so do `min_new_tokens` and `min_length`.

        Raises:
            RequestError: an unknown name, a bad value, a contradiction, or an option given here
                that has no effect without `do_sample=True` or `num_beams` above 1.
        """
        known = {spec.name: spec for spec in fields(self)}
        changes: dict[str, Any] = {}
        for given, value in overrides.items():
            name = _ALIASES.get(given, given)
            if name not in known:
                close = difflib.get_close_matches(given, [*known, *_ALIASES], n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
                raise RequestError(f"unknown generation option {given!r}; {hint}")
            if name in changes:
                raise RequestError(f"{given!r} is another name of {name!r}; give one of them")
            changes[name] = value
        for name, rival in _RIVALS.items():
            if changes.get(name) is not None:
                changes.setdefault(rival, None)
        merged = replace(self, **changes)
        for name in changes:
            needs = known[name].metadata["needs"]
            value = getattr(merged, name)
            if not value or value == known[name].default:
                continue
            if needs == "do_sample" and not merged.do_sample:
                raise RequestError(
                    f"{name} is {value!r}, but greedy decoding does not read it; set "
                    f"do_sample=True or leave {name} out"
                )
            if needs == "num_beams" and merged.num_beams == 1:
                raise RequestError(
                    f"{name} is {value!r}, but only beam search reads it; set num_beams above 1 "
                    f"or leave {name} out"
                )
        return merged

    @property
    def active_eos(self) -> tuple[int, ...]:
        """`eos_token_id`, or nothing where `ignore_eos` is set."""
        return () if self.ignore_eos else self.eos_token_id

    def total_length(self, prompt_length: int, model_max_length: int) -> int:
        """Tokens that prompt and continuation may have together.

        Args:
            prompt_length: tokens of the prompt.
            model_max_length: positions that the model has.

        Raises:
            ContextLengthError: the request needs more than `model_max_length`.
            RequestError: `max_length` leaves no token to generate.
        """
        if prompt_length >= model_max_length:
            raise ContextLengthError(
                f"the prompt has {prompt_length} tokens and the model {model_max_length} "
                "positions, which leaves none for a continuation; shorten the prompt"
            )
        if self.max_new_tokens is not None:
            total, asked = prompt_length + self.max_new_tokens, "max_new_tokens"
        elif self.max_length is not None:
            total, asked = self.max_length, "max_length"
        else:
            return min(prompt_length + DEFAULT_MAX_NEW_TOKENS, model_max_length)
        if total > model_max_length:
            room = model_max_length - (prompt_length if asked == "max_new_tokens" else 0)
            raise ContextLengthError(
                f"{asked}={getattr(self, asked)} after a prompt of {prompt_length} tokens needs "
                f"{total} positions, the model has {model_max_length}; set {asked} to at most "
                f"{room}"
            )
        if total <= prompt_length:
            raise RequestError(
                f"max_length is {total}, but the prompt alone has {prompt_length} tokens; raise "
                "it, or set max_new_tokens instead"
            )
        return total

    def minimum_length(self, prompt_length: int) -> int:
        """Tokens (prompt included) before which end-of-sequence is forbidden."""
        if self.min_new_tokens is not None:
            return prompt_length + self.min_new_tokens
        return self.min_length

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have.

        End-of-sequence ids are not checked: one that is never generated harms nothing.

        Raises:
            RequestError: names the option and the id.
        """
        used: dict[str, list[int]] = {
            "logit_bias": list(self.logit_bias),
            "bad_words_ids": [i for ids in self.bad_words_ids for i in ids],
            "sequence_bias": [i for ids, _ in self.sequence_bias for i in ids],
            "suppress_tokens": list(self.suppress_tokens),
            "begin_suppress_tokens": list(self.begin_suppress_tokens),
            "forced_eos_token_id": list(self.forced_eos_token_id),
        }
        for name, ids in used.items():
            if ids and max(ids) >= vocab_size:
                raise RequestError(
                    f"{name} names token {max(ids)}, but the model has {vocab_size} tokens "
                    f"(0 to {vocab_size - 1}); use ids of this model's tokenizer"
                )
