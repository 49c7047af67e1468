"""The prompts of `neo-generate`: an argument, a file of them, or standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.cli_options import token_ids
from neo_runtime.documents import json_line_values
from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from neo_runtime.prompts import Prompt

__all__ = ["read_prompts"]

_STDIN = "-"
_KEYS = ("prompt", "text", "content")
"""Those of documents; what calls itself a prompt is one before the text that it belongs to."""


def read_prompts(prompt: str | None, file: str | None, *, ids: bool) -> list[Prompt]:
    """The prompts that a command line names, each text or a list of token ids.

    Args:
        prompt: the argument; None for standard input.
        file: JSON lines instead: a path, or `-` for standard input.
        ids: `prompt` is a list of token ids.

    Raises:
        RequestError: both or nothing was given, or something that holds no prompt.
        OSError: the file cannot be read.
    """
    if file is not None:
        if prompt is not None:
            raise RequestError("PROMPT and --prompts-file exclude each other; give one of them")
        return _of_lines(file)
    try:
        if prompt is None:
            prompt = sys.stdin.read().removesuffix("\n")
        prompt.encode()  # a command line may carry bytes that are not text
    except UnicodeError as error:
        raise RequestError(f"the prompt is not valid UTF-8 ({error}); convert it") from error
    if not prompt:
        raise RequestError("the prompt is empty; give PROMPT, or text on standard input")
    if not ids:
        return [prompt]
    try:
        return [token_ids(prompt)]
    except ValueError as error:
        raise RequestError(f"--token-ids: {prompt!r} is not a list of ids such as 1,2,3") from error


def _of_lines(file: str) -> list[Prompt]:
    name = "standard input" if file == _STDIN else file
    try:
        text = sys.stdin.read() if file == _STDIN else Path(file).read_text(encoding="utf-8")
    except UnicodeError as error:
        raise RequestError(f"{name} is not valid UTF-8 ({error}); convert it") from error
    lines = text.removeprefix("\ufeff").split("\n")  # JSON may hold other line breaks
    found = [_prompt(value, name, n) for n, value in json_line_values(lines, name, _KEYS)]
    if not found:
        raise RequestError(f"{name} holds no prompts; expected JSON lines, one prompt each")
    return found


def _prompt(value: object, name: str, number: int) -> Prompt:
    if not isinstance(value, str | list):
        raise RequestError(
            f"{name}, line {number} holds no prompt; expected a string, a list of token ids, "
            'or an object with "prompt", "text" or "content"'
        )
    return value
