"""Constrained decoding in requests: vLLM's `structured_outputs`, OpenAI's `response_format`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neo_runtime.errors import RequestError

from neo_server.errors import bad_request

if TYPE_CHECKING:
    from neo_runtime.model import Model
    from neo_runtime.options.grammar import Grammar

__all__ = ["Form", "asked_form"]

_STRUCTURED = "structured_outputs"
_FORMAT = "response_format"
_NAMES = {"json": "json_schema", "regex": "regex", "choice": "choices", "grammar": "lark"}
"""vLLM's names, and the arguments of `Model.grammar` that they correspond to."""
_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Form:
    """A requested constraint, not yet compiled."""

    field: str
    """The field of the request that has it."""
    name: str
    """Its name within the field."""
    source: tuple[str, Any]
    """Name and value of an argument of `Model.grammar`."""

    def compiled(self, model: Model) -> Grammar:
        """Compile it with `Model.grammar`.

        Raises:
            ApiError: (400) it is invalid or not supported.
        """
        argument, value = self.source
        try:
            return model.grammar(**{argument: value})
        except RequestError as error:
            said = str(error).removeprefix(argument)
            raise bad_request(f"{self.field}.{self.name}{said}", self.field) from error


def asked_form(structured: object, response_format: object) -> Form | None:
    """The constraint that a request asks for; None if it asks for none.

    Args:
        structured: the field `structured_outputs`, None if absent.
        response_format: the field `response_format`, None if absent.

    Raises:
        ApiError: (400) a field is malformed, or both ask for a constraint.
    """
    one, other = _structured(structured), _formatted(response_format)
    if one is not None and other is not None:
        raise bad_request(
            f"{_STRUCTURED} and {_FORMAT} both constrain the text; give only one", _FORMAT
        )
    return one or other


def _structured(given: object) -> Form | None:
    if given is None:
        return None
    known = _NAMES.keys() | {"json_object"}
    if isinstance(given, dict):
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) == 1 and named.keys() <= known:
            [(name, value)] = named.items()
            if name != "json_object":
                return Form(_STRUCTURED, name, (_NAMES[name], value))
            if value is True:
                return Form(_STRUCTURED, name, ("json_schema", _ANY_OBJECT))
    names = ", ".join(sorted(known))
    raise bad_request(
        f"{_STRUCTURED} is {given!r:.200}, expected an object with one of {names}", _STRUCTURED
    )


def _formatted(given: object) -> Form | None:
    if given is None:
        return None
    if isinstance(given, dict):
        kind = given.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            return Form(_FORMAT, "json_object", ("json_schema", _ANY_OBJECT))
        named = given.get("json_schema")
        if kind == "json_schema" and isinstance(named, dict) and named.get("schema") is not None:
            return Form(_FORMAT, "json_schema", ("json_schema", named["schema"]))
    raise bad_request(
        f"{_FORMAT} is {given!r:.200}, expected the type text, json_object, or json_schema with "
        '{"json_schema": {"schema": …}}',
        _FORMAT,
    )
