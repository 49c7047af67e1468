"""Limits the length of the regular expressions of a grammar before a library compiles them.

Time and memory of compiling grow with the square of the length: 10,000 characters take a few
seconds and 0.8 GB, four times as many a minute and gigabytes (llguidance 1.9, whose own limits
apply too late).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from itertools import zip_longest
from typing import Any

__all__ = ["MOST_OF_EXPRESSIONS", "check_lark", "parse_schema"]

MOST_OF_EXPRESSIONS = 10_000
"""Most characters of all regular expressions of one grammar together."""

# Possessive quantifiers: no pattern may backtrack, as clients can send any text.
_DEFINITION = re.compile(r"^[ \t]*+[?!]?([A-Za-z_][\w-]*+)[^\n:\"/]*+:(?!:)", re.MULTILINE)
_PART = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\\n])*+"?)"""
    r"""|(?P<comment>//[^\n]*+)"""
    r"""|(?P<regex>/(?:\\.|[^/\\\n])++/?)"""
    r"""|(?P<name>[A-Za-z_][\w-]*+)"""
)


def parse_schema(text: str) -> Any:
    """Parse a JSON schema and check the length of its patterns.

    Raises:
        ValueError: the text is not JSON, or its regular expressions are too long.
    """
    size = 0

    def counted(found: dict[str, Any]) -> dict[str, Any]:
        nonlocal size
        pattern, named = found.get("pattern"), found.get("patternProperties")
        size += len(pattern) if isinstance(pattern, str) else 0
        size += sum(map(len, named)) if isinstance(named, dict) else 0
        return found

    schema = json.loads(text, object_hook=counted)
    _check(size, "its patterns have")
    return schema


def check_lark(text: str) -> str:
    """Check the length of the expressions of a Lark grammar, and return its text unchanged.

    The length is that of each terminal (in capitals) with the terminals that it names expanded,
    plus the regular expressions of rules. Expansion matters because a few lines, each naming the
    line before twice, stand for a very long expression.

    Raises:
        ValueError: the expressions are too long, or terminals name each other in a cycle.
    """
    size = 0
    own: Counter[str] = Counter()
    named: dict[str, list[str]] = {}
    found = list(_DEFINITION.finditer(text))
    for this, following in zip_longest(found, found[1:]):
        body = text[this.end() : following.start() if following else len(text)]
        parts = list(_PART.finditer(body))
        if this[1].isupper():
            named.setdefault(this[1], []).extend(
                part["name"] for part in parts if part["name"] and part["name"].isupper()
            )
            own[this[1]] += sum(len(part[0]) for part in parts if part["string"] or part["regex"])
        elif "%" in body:  # a nested grammar
            size += len(body)
        else:
            size += sum(len(part["regex"]) for part in parts if part["regex"])
    try:
        order = list(TopologicalSorter(named).static_order())
    except CycleError as error:
        raise ValueError(f"its terminals name each other: {', '.join(error.args[1])}") from error
    written: dict[str, int] = {}
    for name in order:
        written[name] = own[name] + sum(written[other] for other in named.get(name, ()))
    _check(size + sum(written.values()), "its terminals, those that they name written out, have")
    return text


def _check(size: int, what: str) -> None:
    if size > MOST_OF_EXPRESSIONS:
        raise ValueError(f"{what} {size} characters, expected at most {MOST_OF_EXPRESSIONS}")
