"""The form that text must have: vLLM's `structured_outputs`, OpenAI's `response_format`."""

from __future__ import annotations

from typing import Any

from neo_server.errors import bad_request

__all__ = ["asked_form"]

_STRUCTURED = "structured_outputs"
_FORMAT = "response_format"
_NAMES = {"json": "json_schema", "regex": "regex", "choice": "choices", "grammar": "lark"}
"""vLLM's names, and those of `Model.grammar`."""
_ANY_OBJECT = {"type": "object"}


def asked_form(structured: object, response_format: object) -> dict[str, Any]:
    """Arguments for `Model.grammar`; none where any text will do.

    Args:
        structured: the field `structured_outputs`, None if absent.
        response_format: the field `response_format`, None if absent.

    Raises:
        ApiError: one of them has a form that is not known, or both ask for one.
    """
    forms = [_structured(structured), _formatted(response_format)]
    asked = [form for form in forms if form]
    if len(asked) > 1:
        raise bad_request(f"{_STRUCTURED} and {_FORMAT} both ask for a form; give one", _FORMAT)
    return asked[0] if asked else {}


def _structured(given: object) -> dict[str, Any]:
    if given is None:
        return {}
    known = _NAMES.keys() | {"json_object"}
    if isinstance(given, dict):
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) == 1 and named.keys() <= known:
            [(name, value)] = named.items()
            if name != "json_object":
                return {_NAMES[name]: value}
            if value is True:
                return {"json_schema": _ANY_OBJECT}
    names = ", ".join(sorted(known))
    raise bad_request(
        f"{_STRUCTURED} is {given!r:.200}, expected an object with one of {names}", _STRUCTURED
    )


def _formatted(given: object) -> dict[str, Any]:
    if given is None:
        return {}
    if isinstance(given, dict):
        kind = given.get("type")
        if kind == "text":
            return {}
        if kind == "json_object":
            return {"json_schema": _ANY_OBJECT}
        named = given.get("json_schema")
        if kind == "json_schema" and isinstance(named, dict) and "schema" in named:
            return {"json_schema": named["schema"]}
    raise bad_request(
        f"{_FORMAT} is {given!r:.200}, expected the type text, json_object, or json_schema with "
        '{"json_schema": {"schema": …}}',
        _FORMAT,
    )
