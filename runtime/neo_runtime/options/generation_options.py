"""The options of one generation, with the names and defaults of Hugging Face `generate`.

A `GenerationOptions` is validated when it is created: each value on its own, and all of them for
contradictions. A bundle's `generation_config.json` gives the defaults (`from_generation_config`);
a call overrides some of them (`merged`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from neo_runtime.errors import ContextLengthError, RequestError
from neo_runtime.options import values
from neo_runtime.options.checks import check_vocabulary, refuse_contradictions
from neo_runtime.options.generation_config import (
    checked_entries,
    file_error,
    foreign_entries,
    supported_entries,
    usable_entries,
)
from neo_runtime.options.grammar import as_grammar
from neo_runtime.options.names import ALIASES, named_changes
from neo_runtime.options.values import option

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from dataclasses import Field

    from neo_runtime.options.grammar import Grammar
    from neo_runtime.options.values import Processor

__all__ = ["DEFAULT_MAX_NEW_TOKENS", "GenerationOptions"]

DEFAULT_MAX_NEW_TOKENS = 256
"""The limit if neither `max_new_tokens` nor `max_length` is given, as in the text-generation
pipeline of transformers. (`generate` itself uses 20, with a warning.)"""

_UNREAD = {
    "do_sample": "greedy decoding does not read it",
    "num_beams": "only beam search reads it",
}
_TO_READ = {"do_sample": "turn do_sample on", "num_beams": "set num_beams above 1"}


def _no_warning(_: str) -> None:
    """The default of `warn`: ignore the warning."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to continue a prompt, with Hugging Face's names and defaults.

    Values may be given in any usual form (lists, numpy numbers). `None` means the option's neutral
    default (for `top_k`: off). Ranges, and what differs from Hugging Face: docs/sampling.md.

    Attributes:
        max_new_tokens: most tokens to generate; takes precedence over `max_length`. If neither is
            given: `DEFAULT_MAX_NEW_TOKENS`, or fewer if the model has fewer positions left.
        max_length: most tokens of prompt and continuation together.
        min_new_tokens: forbid end of sequence before this many new tokens; takes precedence over
            `min_length`.
        min_length: the same, counting the prompt.
        eos_token_id: end-of-sequence ids; generation ends with the first one generated. None: a
            model uses its own, if it has any.
        ignore_eos: treat `eos_token_id` as empty: continue until another limit.
        stop: end the text before the first of these strings (alias `stop_strings`). Special tokens
            are not text: use `eos_token_id` for them.
        do_sample: draw each token; otherwise take the most probable one.
        seed: of the random draws; None: different each time. A sequence gives one seed per prompt.
        num_return_sequences: continuations per prompt.
        num_beams: above 1: beam search (without sampling).
        length_penalty: beam search: the score of a hypothesis is the sum of its log probabilities
            divided by (new tokens ** length_penalty).
        early_stopping: beam search: stop at `num_beams` finished hypotheses (True), when a better
            one is unlikely (False), or when it is impossible ("never").
        sequence_bias: ((token ids, bias), …): add the bias to the logit of the last id when the ids
            before it were just generated.
        repetition_penalty: above 1: tokens of the prompt and the continuation become less probable.
        no_repeat_ngram_size: above 0: no n-gram of this many tokens appears twice.
        bad_words_ids: token sequences that must not appear.
        forced_eos_token_id: ids allowed for the last token before the length limit.
        remove_invalid_values: replace NaN by 0 and infinities by the largest float32 numbers.
        exponential_decay_length_penalty: (start, factor): after `start` new tokens end of sequence
            becomes more probable at each step.
        suppress_tokens: ids that are never generated.
        begin_suppress_tokens: ids that are not generated first.
        presence_penalty: OpenAI's: subtracted once from the logit of every token generated so far.
        frequency_penalty: OpenAI's: subtracted once for each time the token was generated so far.
        logit_bias: OpenAI's: token id → number to add to its logit.
        logits_processor: functions (ids int64 [n], scores float32 [V]) → scores [V], applied in
            order: ids are prompt and continuation; a score of -inf forbids a token.
        grammar: a compiled grammar from `Model.grammar` that the continuation must match
            (constrained decoding); generation ends when no further text can match.
        temperature: divide the logits by it.
        top_k: keep the k most probable tokens; 0 or None: all.
        top_p: keep the smallest set of most probable tokens whose probabilities sum to at least
            this number.
        min_p: keep tokens of at least this fraction of the largest probability.
        typical_p: keep the most typical tokens whose probabilities sum to at least this number
            (arXiv 2202.00666).
        epsilon_cutoff: keep tokens of at least this probability.
        eta_cutoff: the same, with a limit that falls as the entropy rises (arXiv 2210.15191).
        renormalize_logits: apply log-softmax after all other rules; only beam search is affected.
        logprobs: report the log probability of each generated token, and at each position this
            many of the most probable tokens.

    Raises:
        RequestError: a value is out of its range, or two options contradict each other.
    """

    max_new_tokens: int | None = option(None, values.count(1, optional=True))
    max_length: int | None = option(None, values.count(1, optional=True))
    min_new_tokens: int | None = option(None, values.count(0, optional=True))
    min_length: int = option(0, values.count(0))
    eos_token_id: tuple[int, ...] | None = option(None, values.optional_token_ids)
    ignore_eos: bool = option(False, values.flag)
    stop: tuple[str, ...] = option((), values.strings)

    do_sample: bool = option(False, values.flag)
    seed: int | tuple[int, ...] | None = option(None, values.seeds)
    num_return_sequences: int = option(1, values.count(1))
    num_beams: int = option(1, values.count(1))
    length_penalty: float = option(1.0, values.number(minimum=-10, maximum=10), needs="num_beams")
    early_stopping: Literal[False, True, "never"] = option(
        False, values.choice(False, True, "never"), needs="num_beams"
    )

    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = option((), values.sequence_bias)
    repetition_penalty: float = option(1.0, values.number(above=0))
    no_repeat_ngram_size: int = option(0, values.count(0))
    bad_words_ids: tuple[tuple[int, ...], ...] = option((), values.token_sequences)
    forced_eos_token_id: tuple[int, ...] = option((), values.token_ids)
    remove_invalid_values: bool = option(False, values.flag)
    exponential_decay_length_penalty: tuple[int, float] | None = option(
        None, values.exponential_decay
    )
    suppress_tokens: tuple[int, ...] = option((), values.token_ids)
    begin_suppress_tokens: tuple[int, ...] = option((), values.token_ids)
    presence_penalty: float = option(0.0, values.number())
    frequency_penalty: float = option(0.0, values.number())
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, metadata={"check": values.token_bias, "needs": None}
    )
    logits_processor: tuple[Processor, ...] = option((), values.functions)
    grammar: Grammar | None = field(default=None, metadata={"check": as_grammar, "needs": None})

    temperature: float = option(
        1.0,
        values.number(above=0, hint="for greedy decoding set do_sample=False"),
        needs="do_sample",
    )
    top_k: int | None = option(50, values.count(0, optional=True), needs="do_sample")
    top_p: float = option(1.0, values.number(minimum=0, maximum=1), needs="do_sample")
    min_p: float | None = option(
        None, values.number(minimum=0, maximum=1, optional=True), needs="do_sample"
    )
    typical_p: float = option(1.0, values.number(above=0, maximum=1), needs="do_sample")
    epsilon_cutoff: float = option(0.0, values.number(minimum=0, below=1), needs="do_sample")
    eta_cutoff: float = option(0.0, values.number(minimum=0, below=1), needs="do_sample")
    renormalize_logits: bool = option(False, values.flag)

    logprobs: int | None = option(None, values.count(0, optional=True))

    def __post_init__(self) -> None:
        for spec in fields(self):
            object.__setattr__(self, spec.name, _checked(spec, getattr(self, spec.name)))
        refuse_contradictions(self)

    @classmethod
    def from_generation_config(
        cls,
        config: Mapping[str, Any],
        *,
        eos_token_id: tuple[int, ...] = (),
        model_max_length: int | None = None,
        vocab_size: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = _no_warning,
    ) -> GenerationOptions:
        """The options in a Hugging Face `generation_config.json`, some of them replaced.

        A value that the request replaces is not checked. An invalid value of an option that has no
        effect on the request, such as a temperature without sampling, is ignored.

        Args:
            config: the parsed file; an entry of null counts as absent.
            eos_token_id: the model's own ids, for a file that has none.
            model_max_length: positions of the bundle; a higher limit in the file is lowered to it.
            vocab_size: size of the model's vocabulary; None: token ids are not checked against it.
            overrides: as for `merged`; `NAME=None` also drops an entry that is not an option here.
            warn: called with a message about each entry that is changed or ignored.

        Raises:
            GenerationConfigError: a value is invalid, or an entry that would change the result is
                not supported (the message names it).
            RequestError: an override is invalid, as for `merged`.
        """
        known = {spec.name: spec for spec in fields(cls)}
        off = foreign_entries(overrides or {}, config) - known.keys() - ALIASES.keys()
        changes = named_changes({k: v for k, v in (overrides or {}).items() if k not in off}, known)
        for name, value in changes.items():
            _checked(known[name], value)
        samples = changes.get("do_sample", config.get("do_sample")) is True
        beams = changes.get("num_beams", config.get("num_beams"))
        reads = {
            None: True,
            "do_sample": samples,
            "num_beams": isinstance(beams, int) and beams > 1,
        }

        def unread(name: str) -> str | None:
            needs = known[name].metadata["needs"]
            return None if reads[needs] else _UNREAD[needs]

        entries = supported_entries(
            config, known, ALIASES, replaced={*changes, *off}, samples=samples, warn=warn
        )
        entries = usable_entries(entries, eos_token_id, model_max_length, warn)
        checks = {name: spec.metadata["check"] for name, spec in known.items()}
        return cls._joined(checked_entries(entries, checks, unread, warn), changes, vocab_size)

    @classmethod
    def _joined(
        cls, entries: Mapping[str, Any], changes: Mapping[str, Any], vocab_size: int | None
    ) -> GenerationOptions:
        """Merge entries and changes; an error that the changes alone do not cause is the file's."""

        def made(values: Mapping[str, Any]) -> GenerationOptions:
            options = cls(**values)
            if vocab_size is not None:
                check_vocabulary(options, vocab_size)
            return options

        try:
            joined = made({**entries, **changes})
        except RequestError as error:
            try:
                made(changes)
            except RequestError as own:
                if str(own) == str(error):
                    raise
            raise file_error(str(error)) from error
        joined._refuse_unread(changes)
        return joined

    def merged(self, **overrides: Any) -> GenerationOptions:
        """These options with some replaced, as a call with keyword arguments does.

        `max_new_tokens` given here replaces a `max_length` of the defaults, and vice versa; the
        same holds for `min_new_tokens` and `min_length`.

        Raises:
            RequestError: a name is unknown, a value is invalid, two options contradict each other,
                or an option given here has no effect without `do_sample=True` or `num_beams` above
                1.
        """
        known = [spec.name for spec in fields(self)]
        off = foreign_entries(overrides, {})
        changes = named_changes({k: v for k, v in overrides.items() if k not in off}, known)
        merged = replace(self, **changes)
        merged._refuse_unread(changes)
        return merged

    def unread(self) -> dict[str, str]:
        """Options that are set but have no effect with the others, each with the reason."""
        found = {}
        for spec in fields(self):
            needs, value = spec.metadata["needs"], getattr(self, spec.name)
            is_read = self.do_sample if needs == "do_sample" else self.num_beams > 1
            if needs is not None and not is_read and value and value != spec.default:
                found[spec.name] = needs
        return {name: _UNREAD[needs] for name, needs in found.items()}

    def _refuse_unread(self, changes: Mapping[str, Any]) -> None:
        needs = {spec.name: spec.metadata["needs"] for spec in fields(self)}
        unread = self.unread()
        for name in changes:
            if name in unread:
                raise RequestError(
                    f"{name} is {getattr(self, name)!r}, but {unread[name]}; "
                    f"{_TO_READ[needs[name]]} or leave {name} out"
                )

    @property
    def active_eos(self) -> tuple[int, ...]:
        """`eos_token_id`; empty if `ignore_eos` is set."""
        return () if self.ignore_eos else self.eos_token_id or ()

    def total_length(self, prompt_length: int, most: int, holder: str = "the model") -> int:
        """Most tokens of prompt and continuation together.

        Args:
            prompt_length: tokens of the prompt.
            most: positions available.
            holder: what has these positions, for messages.

        Raises:
            ContextLengthError: the request needs more than `most`.
            RequestError: `max_length` leaves no token to generate.
        """
        if prompt_length >= most:
            raise ContextLengthError(
                f"the prompt has {prompt_length} tokens and {holder} {most} "
                "positions, which leaves none for a continuation; shorten the prompt"
            )
        if self.max_new_tokens is not None:
            total, asked = prompt_length + self.max_new_tokens, "max_new_tokens"
        elif self.max_length is not None:
            total, asked = self.max_length, "max_length"
        else:
            return min(prompt_length + DEFAULT_MAX_NEW_TOKENS, most)
        if total > most:
            room = most - (prompt_length if asked == "max_new_tokens" else 0)
            raise ContextLengthError(
                f"{asked}={getattr(self, asked)} after a prompt of {prompt_length} tokens needs "
                f"{total} positions, {holder} has {most}; set {asked} to at most "
                f"{room}"
            )
        if total <= prompt_length:
            raise RequestError(
                f"max_length is {total}, but the prompt alone has {prompt_length} tokens; raise "
                "it, or set max_new_tokens instead"
            )
        return total

    def minimum_length(self, prompt_length: int) -> int:
        """Least length in tokens (prompt included) at which end-of-sequence is allowed."""
        if self.min_new_tokens is not None:
            return prompt_length + self.min_new_tokens
        return self.min_length


def _checked(spec: Field[Any], value: Any) -> Any:
    """The validated value in its canonical type; None becomes the default."""
    if value is None and spec.name != "top_k":  # None means off for top_k, like 0
        value = {} if spec.name == "logit_bias" else spec.default
    return spec.metadata["check"](spec.name, value)
