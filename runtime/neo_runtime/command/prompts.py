"""Read the prompts of `neo-generate`: an argument, a file of prompts, or standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from neo_runtime.command.options import token_ids
from neo_runtime.errors import RequestError
from neo_runtime.text.documents import json_lines, value_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TextIO

    from neo_runtime.generation.prefix import Prefix
    from neo_runtime.model import Model
    from neo_runtime.options.generation_options import GenerationOptions
    from neo_runtime.text.prompts import Prompt

__all__ = ["GivenPrompt", "read_prompts", "read_text", "shortened"]

_STDIN = "-"
_KEYS = ("prompt", "text", "content")
"""Those of documents; what calls itself a prompt is one before the text that it belongs to."""


class GivenPrompt(NamedTuple):
    """A prompt, and the entries that identify its completion in the output."""

    prompt: Prompt
    """Text, or a list of token ids."""
    tag: dict[str, Any]
    """The "id" of the prompt's object, if it has one."""


def read_prompts(prompt: str | None, file: str | None, *, ids: bool) -> list[GivenPrompt]:
    """Read the prompts that the command line names.

    Args:
        prompt: the argument; None for standard input.
        file: a file of JSON lines instead of `prompt`: a path, or `-` for standard input.
        ids: whether `prompt` is a list of token ids.

    Raises:
        RequestError: both or neither was given, or there is no prompt in it.
        OSError: the file cannot be read.
    """
    if file is not None:
        if prompt is not None:
            raise RequestError("PROMPT and --prompts-file exclude each other; give one of them")
        return _of_lines(file)
    try:
        if prompt is None:
            prompt = _stdin().read().removesuffix("\n").removesuffix("\r")
        prompt.encode()  # a command line may carry bytes that are not text
    except UnicodeError as error:
        # A terminal's text is in the locale's encoding, as arguments are.
        name = getattr(error, "encoding", "utf-8").upper()
        raise RequestError(f"the prompt is not valid {name} ({error}); convert it") from error
    if not prompt:
        raise RequestError("the prompt is empty; give PROMPT, or text on standard input")
    if not ids:
        return [GivenPrompt(prompt, {})]
    try:
        return [GivenPrompt(token_ids(prompt), {})]
    except ValueError as error:
        raise RequestError(f"--token-ids: {prompt!r} is not a list of ids such as 1,2,3") from error


def _stdin() -> TextIO:
    if sys.stdin is None:
        raise RequestError("standard input is closed; give PROMPT, or a --prompts-file")
    return sys.stdin


def read_text(file: str) -> str:
    """Read a text file unchanged; `-` for standard input.

    Raises:
        RequestError: it is not UTF-8.
        OSError: it cannot be read.
    """
    name, data = _read(file)
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeError as error:
        raise RequestError(f"{name} is not valid UTF-8 ({error}); convert it") from error


def _read(file: str) -> tuple[str, bytes]:
    """The name of a file in messages, and its contents."""
    if file == _STDIN:
        return "standard input", _stdin().buffer.read()
    return file, Path(file).read_bytes()


def shortened(
    model: Model,
    prompts: Sequence[GivenPrompt],
    most: int,
    chosen: GenerationOptions,
    prefix: Prefix | None,
) -> list[GivenPrompt]:
    """Truncate prompts on the left, and convert them to token ids.

    Args:
        model: encodes the text.
        prompts: text or token ids.
        most: tokens to keep; -1 for as many as `chosen` leaves room for.
        chosen: the options.
        prefix: the shared prefix, which takes positions too.

    Raises:
        RequestError: a prompt is invalid, or there is no room for a prompt.
    """
    if most == -1:
        most = _room(chosen, model.manifest.max_length)
        most -= 0 if prefix is None else len(prefix.ids)
        if most < 1:
            raise RequestError(
                f"the model has {model.manifest.max_length} positions, and the continuation, with "
                "the prefix, leaves none for a prompt; ask for fewer new tokens"
            )
    ids = model.encode_prompts([prompt for prompt, _ in prompts])
    return [
        GivenPrompt(one[-most:].tolist(), tag) for one, (_, tag) in zip(ids, prompts, strict=True)
    ]


def _room(chosen: GenerationOptions, positions: int) -> int:
    """Most tokens of a prompt: `max_length` includes the continuation, of at least one token."""
    from neo_runtime.options.generation_options import DEFAULT_MAX_NEW_TOKENS

    if chosen.max_new_tokens is None and chosen.max_length is not None:
        return min(chosen.max_length, positions) - 1
    return positions - (chosen.max_new_tokens or DEFAULT_MAX_NEW_TOKENS)


def _of_lines(file: str) -> list[GivenPrompt]:
    name, data = _read(file)
    try:
        text = data.decode()  # JSON is UTF-8, whatever the locale's encoding is
    except UnicodeError as error:
        raise RequestError(f"{name} is not valid UTF-8 ({error}); convert it") from error
    lines = text.removeprefix("\ufeff").split("\n")  # JSON may hold other line breaks
    found = [_of_line(name, number, entry) for number, entry in json_lines(lines, name)]
    if not found:
        raise RequestError(f"{name} holds no prompts; expected JSON lines, one prompt each")
    return found


def _of_line(name: str, number: int, entry: object) -> GivenPrompt:
    prompt = value_of(entry, _KEYS)
    if not isinstance(prompt, str | list):
        raise RequestError(
            f"{name}, line {number} holds no prompt; expected a string, a list of token ids, "
            'or an object with "prompt", "text" or "content"'
        )
    tag = {"id": entry["id"]} if isinstance(entry, dict) and "id" in entry else {}
    return GivenPrompt(prompt, tag)
