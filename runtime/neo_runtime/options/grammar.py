"""Constrained decoding: JSON schemas, regular expressions, choices and context-free grammars.

They are compiled and matched by llguidance, which the extra `grammar` installs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from neo_runtime.errors import DependencyError, RequestError
from neo_runtime.options.form_size import MOST_OF_EXPRESSIONS, check_lark, parse_schema
from neo_runtime.options.values import strings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

__all__ = ["Grammar", "GrammarCompiler", "as_grammar", "why"]

_SEPARATORS = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""The default whitespace of generated JSON: a model that is allowed endless spaces writes them.
`x-guidance` in the schema takes precedence."""
_MOST_CHARACTERS = 100_000
"""Most characters of a source."""
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 200_000,
    "max_grammar_size": 20_000,
    "max_lexer_states": 10_000,
    "step_lexer_fuel": 20_000,
    "step_max_items": 5_000,
    "verbose_errors": False,
}
"""A tenth of the library's defaults, or less: one request's step must not delay all others. Enough
for schemas with hundreds of properties and thousands of values."""
_SAID = 200
"""Characters to quote from the beginning and from the end of the library's messages."""

_of_parents: list[Any] = []
"""Matchers of the parent process, kept here because a forked child must not free them."""
_END: dict[str, Any] = {
    "content": "\ue000end\ue000",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}
"""The entry of a `tokenizer.json` for an artificial end-of-text token."""


class Grammar:
    """A compiled grammar that continuations must match: the value of the option `grammar`.

    Made by `Model.grammar`. Several threads may use one at once.
    """

    def __init__(self, compiler: GrammarCompiler, source: str, matcher: Any) -> None:
        """Take the source, in the library's syntax, and its compiled matcher, only to be copied."""
        self._compiler, self._source = compiler, source
        self._compiled = os.getpid(), matcher

    def check(self, compiler: GrammarCompiler | None) -> None:
        """Check that the grammar was made by this compiler.

        Raises:
            RequestError: it belongs to another model.
        """
        if compiler is not self._compiler:
            raise RequestError("the grammar is another model's; make one with this one's grammar")

    def matcher(self) -> Any:
        """A new `LLMatcher` for one sequence."""
        process, matcher = self._compiled
        if process != os.getpid():
            # Copies share a lock, which another thread may have held at the fork. Freeing a copy
            # would wait for that lock too, so the parent's matcher is kept.
            _of_parents.append(matcher)
            matcher = self._renewed()
        return matcher.deep_copy()

    def own_matcher(self) -> Any:
        """A new `LLMatcher` that shares no state, for use when the shared table is full.

        Copies share a table of states, which grows with the texts matched, up to a limit. Copies
        made after this call share a new table.
        """
        self._renewed()
        return self._compiler.compiled(self._source)

    def _renewed(self) -> Any:
        matcher = self._compiler.compiled(self._source)
        self._compiled = os.getpid(), matcher
        return matcher

    @property
    def special_tokens(self) -> tuple[int, ...]:
        """Special tokens, which are not text; a grammar never allows them."""
        return self._compiler.special_tokens

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        """The object itself, as it is immutable."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled."""
        raise TypeError("a Grammar belongs to a loaded model; make it with Model.grammar there")


class GrammarCompiler:
    """Compiles grammars for the tokens of one model."""

    def __init__(self, tokenizer: str, vocab_size: int) -> None:
        """Prepare the tokenizer; one of 50,000 tokens takes a quarter of a second.

        Args:
            tokenizer: contents of the model's `tokenizer.json`.
            vocab_size: size of the model's vocabulary.

        Raises:
            DependencyError: llguidance is missing.
            RequestError: the tokenizer is not byte-level BPE.
        """
        try:
            import llguidance
        except ImportError as error:
            raise DependencyError(
                "grammars need the package llguidance; install neo-onnx with its extra grammar, or "
                "pip install llguidance"
            ) from error
        self._library: Any = llguidance
        self._limits = llguidance.LLParserLimits(**_LIMITS)
        try:
            self._read(json.loads(tokenizer), vocab_size)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RequestError(
                f"grammars cannot be used with the bundle's tokenizer ({error}); byte-level BPE, "
                "as GPT-Neo has it, is expected"
            ) from error

    def _read(self, tokenizer: dict[str, Any], vocab_size: int) -> None:
        end = 1 + max(tokenizer["model"]["vocab"].values())
        # Special tokens are left out: text that looks like one is written with ordinary tokens.
        # The end of text is an artificial token, as a request may set any end-of-sequence ids.
        added = tokenizer.get("added_tokens") or []
        self.special_tokens = (end, *(each["id"] for each in added if each["special"]))
        text = json.dumps(tokenizer | {"added_tokens": [_END | {"id": end}]})
        size = max(vocab_size, end + 1)
        self._tokenizer = self._library.LLTokenizer(text, n_vocab=size, eos_token=end)

    def compile(self, **given: Any) -> Grammar:
        """See `Model.grammar`; all but one of its arguments are None."""
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) != 1:
            raise RequestError(
                f"a grammar of {', '.join(named) or 'nothing'}; give one of {', '.join(given)}"
            )
        [(name, value)] = named.items()
        try:
            source = self._source(name, value)
        except RecursionError as error:  # whose text is about the interpreter
            raise RequestError(f"{name} cannot be used: it is nested too deeply") from error
        except ValueError as error:
            raise RequestError(f"{name} cannot be used: {error}") from error
        matcher = self.compiled(source)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the most expensive one, if the grammar exceeds the limits
        if matcher.is_error():
            raise RequestError(f"{name} cannot be used: {why(matcher)}")
        return Grammar(self, source, matcher)

    def compiled(self, source: str) -> Any:
        """An `LLMatcher`, which may have an error."""
        return self._library.LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)

    def _source(self, name: str, value: Any) -> str:
        """The grammar in the form that the library compiles."""
        make = self._library.LLMatcher
        if name == "choices":
            quoted = [json.dumps(text) for text in _checked(name, strings(name, value))]
            if not quoted:
                raise ValueError("there are none")
            # A terminal (in capitals), since a rule may have only 2000 alternatives.
            return str(make.grammar_from_lark("start: TEXT\nTEXT: " + " | ".join(quoted)))
        if name == "json_schema":
            text = value if isinstance(value, str) else _as_json(value)
            schema = parse_schema(_checked(name, (text,))[0])
            if not isinstance(schema, dict):
                raise ValueError("expected an object")
            return str(make.grammar_from_json_schema(json.dumps(schema), defaults=_SEPARATORS))
        if not isinstance(value, str):
            raise ValueError(f"expected text, found {type(value).__name__}")
        if name == "regex":
            return str(make.grammar_from_regex(*_checked(name, (value,), MOST_OF_EXPRESSIONS)))
        return str(make.grammar_from_lark(check_lark(*_checked(name, (value,)))))


def why(matcher: Any) -> str:
    """The error of an `LLMatcher` in one line, shortened as it may quote the whole source."""
    said = " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())
    return said if len(said) <= 2 * _SAID else f"{said[:_SAID]} … {said[-_SAID:]}"


def as_grammar(name: str, value: Any) -> Grammar | None:
    """The check of the option `grammar`: None, or a result of `Model.grammar`."""
    if value is None or isinstance(value, Grammar):
        return value
    raise RequestError(f"{name} is {value!r}, expected what Model.grammar(…) gives")


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, default=_object)
    except TypeError as error:
        raise ValueError(f"it is not JSON: {error}") from error


def _object(value: Any) -> dict[Any, Any]:
    """Any mapping as a JSON object."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _checked(name: str, texts: Sequence[str], most: int = _MOST_CHARACTERS) -> Sequence[str]:
    """Raises RequestError for a source that is too long."""
    size = sum(map(len, texts))
    if size > most:
        raise RequestError(f"{name} has {size} characters, expected at most {most}")
    return texts
