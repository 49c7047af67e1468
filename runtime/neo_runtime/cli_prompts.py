"""The prompts of `neo-generate`: an argument, a file of them, or standard input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_runtime.cli_options import token_ids
from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from neo_runtime.prompts import Prompt

__all__ = ["read_prompts"]

_STDIN = "-"


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
    found = [_of_line(name, n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise RequestError(f"{name} holds no prompts; expected JSON lines, one prompt each")
    return found


def _of_line(name: str, number: int, line: str) -> Prompt:
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{name}, line {number} is not JSON ({error})") from error
    if isinstance(entry, dict):
        entry = entry.get("prompt", entry.get("text"))
    if not isinstance(entry, str | list):
        raise RequestError(
            f"{name}, line {number} holds no prompt; expected a string, a list of token ids, "
            'or an object with "prompt" or "text"'
        )
    prompt: Prompt = entry
    return prompt
