"""Read documents from text files and JSON Lines files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from neo_runtime.errors import RequestError
from neo_runtime.json_input import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from neo_runtime.bundle.manifest import ModelSpec
    from neo_runtime.text.tokenizer import Tokenizer

__all__ = ["document_ids", "json_lines", "read_documents", "value_of"]

_SUFFIXES = (".jsonl", ".ndjson", ".json")
"""Suffixes of files with one JSON document per line."""
_KEYS = ("text", "prompt", "content")
_CHARACTERS = 16
"""Characters of a plain text file that are read for each requested token."""


def read_documents(file: TextIO, name: str, tokens: int) -> Iterator[str]:
    """Yield the documents of a file, reading it lazily.

    A `.jsonl`, `.ndjson` or `.json` file has one document per line: a string, or an object with
    "text", "prompt" or "content". Any other file is one document.

    Args:
        file: opened with encoding "utf-8-sig", which skips a byte order mark.
        name: the file's name; its suffix selects the format, and errors contain it.
        tokens: most tokens that will be used. Of a plain text file, only the first 16 characters
            per token are read.

    Raises:
        RequestError: the file is not UTF-8, or a line does not contain a document.
        OSError: the file cannot be read.
    """
    try:
        if Path(name).suffix.lower() not in _SUFFIXES:
            document = file.read(_CHARACTERS * tokens)
            if document.strip():
                yield document
            return
        for number, entry in json_lines(file, name):
            value = value_of(entry, _KEYS)
            if not isinstance(value, str):
                raise RequestError(
                    f"{name}, line {number} does not contain a document; expected a string, or an "
                    'object with "text", "prompt" or "content"'
                )
            yield value
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} is not UTF-8 text ({error.reason}); convert it to UTF-8"
        ) from error


def json_lines(lines: Iterable[str], name: str) -> Iterator[tuple[int, object]]:
    """Yield the line number (from 1) and the parsed value of each line that is not blank.

    Raises:
        RequestError: a line is not valid JSON.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line, parse_constant=_refuse)
        except ValueError as error:
            raise RequestError(
                f"{name}, line {number} is not valid JSON ({error}); expected one JSON value per "
                "line"
            ) from error
        yield number, value


def _refuse(constant: str) -> None:
    """Reject NaN and infinities, which Python's parser accepts although JSON does not have them."""
    raise ValueError(f"{constant} is not a JSON number")


def value_of(entry: object, keys: tuple[str, ...]) -> object:
    """The value of the first of `keys` that an object has, else None; other values unchanged."""
    if isinstance(entry, dict):
        return next((entry[key] for key in keys if key in entry), None)
    return entry


def document_ids(
    documents: Iterable[str], tokenizer: Tokenizer, model: ModelSpec, tokens: int
) -> list[int]:
    """The first `tokens` token ids of some documents, separated by the end-of-text token.

    Special tokens that the tokenizer adds to a prompt are left out.

    Raises:
        RequestError: the tokenizer returns an id outside of the model's vocabulary.
    """
    ids: list[int] = []
    for document in documents:
        found = tokenizer.encode(document, add_special_tokens=False)
        ids += [*model.separator, *found] if ids and found else found
        if len(ids) >= tokens:
            break
    if max(ids, default=0) >= model.vocab_size:
        raise RequestError(
            f"the tokenizer returned token id {max(ids)}, but the model has {model.vocab_size} "
            "tokens; use the tokenizer of this model"
        )
    return ids[:tokens]
