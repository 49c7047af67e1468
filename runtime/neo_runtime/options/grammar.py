"""Forms that text must have: JSON schemas, regular expressions, choices, grammars.

Compiled and followed by llguidance, which the extra `grammar` installs.
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
"""How JSON is written where the schema does not say: a model that may write spaces without end
does. `x-guidance` of the schema takes precedence."""
_MOST_CHARACTERS = 100_000
"""Of a source."""
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 200_000,
    "max_grammar_size": 20_000,
    "max_lexer_states": 10_000,
    "step_lexer_fuel": 20_000,
    "step_max_items": 5_000,
    "verbose_errors": False,
}
"""A tenth of the library's own, or less: a step must not hold up everybody else. Enough for schemas
of hundreds of properties and thousands of values."""
_SAID = 200
"""Characters of the library's words, from their beginning and from their end."""

_of_parents: list[Any] = []
"""Matchers that a forked child must not free."""
_END: dict[str, Any] = {
    "content": "\ue000end\ue000",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}
"""What stands for the end of a text in a `tokenizer.json`."""


class Grammar:
    """A form that continuations must have: the option `grammar`. Threads may share it.

    Made by `Model.grammar`.
    """

    def __init__(self, compiler: GrammarCompiler, source: str, matcher: Any) -> None:
        """Take a source as the library compiles it, and what came of it, which is only copied."""
        self._compiler, self._source = compiler, source
        self._compiled = os.getpid(), matcher

    def check(self, compiler: GrammarCompiler | None) -> None:
        """Refuse what another model's compiler has made.

        Raises:
            RequestError: it has.
        """
        if compiler is not self._compiler:
            raise RequestError("the grammar is another model's; make one with this one's grammar")

    def matcher(self) -> Any:
        """An `LLMatcher` for one sequence, of which nothing was written yet."""
        process, matcher = self._compiled
        if process != os.getpid():
            # Copies share a lock, which another thread may have held when this child was forked
            # off; to free what it locks would wait for it as well.
            _of_parents.append(matcher)
            matcher = self._renewed()
        return matcher.deep_copy()

    def own_matcher(self) -> Any:
        """One that shares nothing, for a text for which the others' table is full.

        Copies share a table of states. It grows by the texts that are followed, up to a limit.
        Later ones share another.
        """
        self._renewed()
        return self._compiler.compiled(self._source)

    def _renewed(self) -> Any:
        matcher = self._compiler.compiled(self._source)
        self._compiled = os.getpid(), matcher
        return matcher

    @property
    def special_tokens(self) -> tuple[int, ...]:
        """Tokens that are no text, whatever a form allows."""
        return self._compiler.special_tokens

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        """Itself: nothing of it changes."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled."""
        raise TypeError("a Grammar belongs to a loaded model; make it with Model.grammar there")


class GrammarCompiler:
    """Compiles grammars for the tokens of one model."""

    def __init__(self, tokenizer: str, vocab_size: int) -> None:
        """Prepare; a tokenizer of 50,000 tokens takes a quarter of a second.

        Args:
            tokenizer: of the model, as `tokenizer.json` has it.
            vocab_size: tokens that the model has.

        Raises:
            DependencyError: llguidance is missing.
            RequestError: it is a tokenizer of another kind.
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
        # Text is text: what looks like a special token is written with other tokens. And the end
        # is a token of its own here, as a request may end with any.
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
            matcher.compute_bitmask()  # the dearest one of a grammar that is too much
        if matcher.is_error():
            raise RequestError(f"{name} cannot be used: {why(matcher)}")
        return Grammar(self, source, matcher)

    def compiled(self, source: str) -> Any:
        """An `LLMatcher`, which may have an error."""
        return self._library.LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)

    def _source(self, name: str, value: Any) -> str:
        """What the library compiles."""
        make = self._library.LLMatcher
        if name == "choices":
            quoted = [json.dumps(text) for text in _checked(name, strings(name, value))]
            if not quoted:
                raise ValueError("there are none")
            # A terminal (in capitals): a rule may have 2000 alternatives.
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
    """What went wrong with an `LLMatcher`, in one line, without all of the source."""
    said = " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())
    return said if len(said) <= 2 * _SAID else f"{said[:_SAID]} … {said[-_SAID:]}"


def as_grammar(name: str, value: Any) -> Grammar | None:
    """None, or what `Model.grammar` gave."""
    if value is None or isinstance(value, Grammar):
        return value
    raise RequestError(f"{name} is {value!r}, expected what Model.grammar(…) gives")


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, default=_object)
    except TypeError as error:
        raise ValueError(f"it is not JSON: {error}") from error


def _object(value: Any) -> dict[Any, Any]:
    """Any mapping as the object that it stands for."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _checked(name: str, texts: Sequence[str], most: int = _MOST_CHARACTERS) -> Sequence[str]:
    """Raises RequestError for a source that is too long."""
    size = sum(map(len, texts))
    if size > most:
        raise RequestError(f"{name} has {size} characters, expected at most {most}")
    return texts
