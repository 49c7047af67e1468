"""Parse a bundle's JSON strictly: missing and unknown fields and wrong types are errors."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from neo_runtime.errors import BundleDamagedError
from neo_runtime.json_input import parse_json

__all__ = ["parse_object", "parse_strictly"]


def parse_object(text: str | bytes, source: object) -> dict[str, Any]:
    """Parse JSON that must contain one object.

    Args:
        text: JSON text.
        source: name of its file, for errors.

    Raises:
        BundleDamagedError: the text is not JSON, or not an object.
    """
    try:
        raw = parse_json(text)
    except ValueError as error:
        raise BundleDamagedError(
            f"{source} is not valid JSON ({error}); export the bundle again"
        ) from error
    if not isinstance(raw, dict):
        raise BundleDamagedError(
            f"{source} contains {type(raw).__name__}, expected a JSON object; export the bundle "
            "again"
        )
    return raw


def parse_strictly(kind: Any, raw: Any, where: str) -> Any:
    """Convert a parsed JSON value to a type.

    Args:
        kind: a dataclass, tuple, dict, Literal, union or plain type.
        raw: the parsed value; an int is accepted for float.
        where: the value's place, for errors.

    Raises:
        BundleDamagedError: a field is missing or unknown, or a value has the wrong type. The caller
            adds what to do.
    """
    origin = get_origin(kind)
    if is_dataclass(kind):
        return _parse_dataclass(kind, raw, where)
    if origin in (Union, UnionType):
        return _parse_union(kind, raw, where)
    if origin is tuple and isinstance(raw, list):
        arguments = get_args(kind)
        if arguments[-1] is Ellipsis:
            return tuple(
                parse_strictly(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(raw)
            )
        if len(arguments) == len(raw):
            return tuple(
                parse_strictly(a, item, where) for a, item in zip(arguments, raw, strict=True)
            )
    if origin is dict and isinstance(raw, dict):
        value_kind = get_args(kind)[1]
        return {
            key: parse_strictly(value_kind, item, f"{where}.{key}") for key, item in raw.items()
        }
    if origin is Literal and raw in get_args(kind):
        return raw
    if kind is float and type(raw) in (int, float):
        return float(raw)
    if isinstance(kind, type) and type(raw) is kind:
        return raw
    raise BundleDamagedError(f"{where}: found {raw!r}, expected {_name(kind)}")


def _parse_dataclass(kind: Any, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise BundleDamagedError(f"{where}: found {raw!r}, expected an object")
    hints = get_type_hints(kind)
    names = {f.name for f in fields(kind)}
    if unknown := raw.keys() - names:
        raise BundleDamagedError(f"{where}: unknown field {min(unknown)!r}")
    if missing := names - raw.keys():
        raise BundleDamagedError(f"{where}: field {min(missing)!r} is missing")
    return kind(
        **{name: parse_strictly(hints[name], raw[name], f"{where}: {name}") for name in names}
    )


def _parse_union(kind: Any, raw: Any, where: str) -> Any:
    for member in get_args(kind):
        try:
            return (
                None if member is type(None) and raw is None else parse_strictly(member, raw, where)
            )
        except BundleDamagedError:
            continue
    raise BundleDamagedError(f"{where}: found {raw!r}, expected {_name(kind)}")


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)
