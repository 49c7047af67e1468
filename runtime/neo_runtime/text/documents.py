"""Text that a user gives in a file: documents, and JSON lines of them."""

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
"""Of files with a document a line."""
_KEYS = ("text", "prompt", "content")
_CHARACTERS = 16
"""Most characters of a plain text that are read for each token that is wanted."""


def read_documents(file: TextIO, name: str, tokens: int) -> Iterator[str]:
    """Documents of a file, read as far as they are asked for.

    A file named `.jsonl`, `.ndjson` or `.json` has one on each line: a string, or an object with
    "text", "prompt" or "content". Any other file is one document.

    Args:
        file: open as "utf-8-sig", which passes over a byte order mark.
        name: the file's, which also goes into errors.
        tokens: how many will be used at most: no more of a plain text is read than surely has them.

    Raises:
        RequestError: it is not UTF-8, or a line holds no document.
        OSError: it cannot be read.
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
                    f"{name}, line {number} holds no document; expected a string, or an object "
                    'with "text", "prompt" or "content"'
                )
            yield value
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 text ({error.reason}); convert it") from error


def json_lines(lines: Iterable[str], name: str) -> Iterator[tuple[int, object]]:
    """The values of the lines that are not blank, each with its number from 1 on.

    Raises:
        RequestError: a line is not JSON.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line, parse_constant=_refuse)
        except ValueError as error:
            raise RequestError(f"{name}, line {number} is not JSON ({error})") from error
        yield number, value


def _refuse(constant: str) -> None:
    """Python's parser takes NaN and infinities, and JSON has none."""
    raise ValueError(f"{constant} is no number of JSON")


def value_of(entry: object, keys: tuple[str, ...]) -> object:
    """The first of `keys` that an object has, None where it has none; anything else as it is."""
    if isinstance(entry, dict):
        return next((entry[key] for key in keys if key in entry), None)
    return entry


def document_ids(
    documents: Iterable[str], tokenizer: Tokenizer, model: ModelSpec, tokens: int
) -> list[int]:
    """The first `tokens` token ids of documents, joined by the end-of-text token.

    Special tokens that the tokenizer would add are left out: they mark where a prompt begins.

    Raises:
        RequestError: the model has no token of such an id.
    """
    ids: list[int] = []
    for document in documents:
        found = tokenizer.encode(document, add_special_tokens=False)
        ids += [*model.separator, *found] if ids and found else found
        if len(ids) >= tokens:
            break
    if max(ids, default=0) >= model.vocab_size:
        raise RequestError(
            f"the tokenizer gives the token id {max(ids)}, but the model has {model.vocab_size} "
            "tokens; is the tokenizer another model's?"
        )
    return ids[:tokens]
