"""The flags of `neo-generate` for structured output: a grammar that the text must match."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neo_runtime.command.prompts import read_text

if TYPE_CHECKING:
    import argparse

__all__ = ["add_form_flags", "given_form"]


def add_form_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags; see `given_form`."""
    titled = parser.add_argument_group("structured output (extra grammar)")
    group = titled.add_mutually_exclusive_group()
    group.add_argument(
        "--json-schema", metavar="FILE", help="the text is JSON that matches this schema"
    )
    group.add_argument(
        "--regex", metavar="PATTERN", help="the text matches this regular expression"
    )
    group.add_argument(
        "--choice",
        dest="choices",
        action="append",
        metavar="TEXT",
        help="the text is one of the choices; may be repeated",
    )
    group.add_argument(
        "--lark", metavar="FILE", help="the text matches this grammar, in llguidance's Lark syntax"
    )


def given_form(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `Model.grammar`, files read; empty without such a flag.

    Raises:
        RequestError: a file cannot be read.
    """
    form: dict[str, Any] = {"regex": arguments.regex, "choices": arguments.choices}
    for name in ("json_schema", "lark"):
        path = getattr(arguments, name)
        form[name] = None if path is None else read_text(path)
    return {name: value for name, value in form.items() if value is not None}
