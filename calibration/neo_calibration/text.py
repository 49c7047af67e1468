"""Calibration text → contexts of token ids, packed full."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from neo_runtime.errors import RequestError, StatisticsError
from neo_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from neo_export.checkpoint import Checkpoint
    from numpy.typing import NDArray

__all__ = ["CalibrationText", "read_text"]

_FEW = 1024
_CHARACTERS = 16
"""Characters of a text file that are tokenized for each token that is wanted."""
_KEYS = ("text", "prompt", "content")


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """What will be run."""

    contexts: tuple[NDArray[np.int64], ...]
    """Token ids; each context starts at position 0. All but the last are `max_length` long."""
    max_length: int
    files: dict[str, str]
    """Name of each file → sha256 of its bytes."""
    warnings: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Positions in all."""
        return sum(len(context) for context in self.contexts)

    @property
    def digest(self) -> str:
        """sha256 (hex) of the contexts' lengths and token ids."""
        digest = hashlib.sha256(repr([len(context) for context in self.contexts]).encode())
        for context in self.contexts:
            digest.update(context.astype("<i8").tobytes())
        return digest.hexdigest()


def read_text(
    files: Sequence[Path], checkpoint: Checkpoint, tokens: int, max_length: int | None
) -> CalibrationText:
    """Tokenize, and pack into full contexts until there are `tokens` of them.

    Args:
        files: UTF-8 text, one document each; or `.jsonl` / `.json`, a document a line: a string,
            or an object with "text", "prompt" or "content". Documents are joined by the model's
            end-of-text token.
        checkpoint: gives the tokenizer and the position table's length.
        tokens: how many positions to take at most.
        max_length: positions a context has; None for all that the model has.

    Raises:
        StatisticsError: a file cannot be read, or there is no text.
        RequestError: `max_length` or `tokens` is out of range.
        CheckpointError: the model has no usable tokenizer.
    """
    spec = checkpoint.spec
    length = spec.max_position_embeddings if max_length is None else max_length
    if not 1 <= length <= spec.max_position_embeddings:
        raise RequestError(
            f"--max-length is {length}, expected 1 to {spec.max_position_embeddings}: the "
            "checkpoint's position table has no more rows"
        )
    if tokens < 1:
        raise RequestError(f"--tokens is {tokens}, expected at least 1")
    ids, digests = _token_ids(files, checkpoint, tokens)
    if not ids:
        names = ", ".join(map(str, files))
        raise StatisticsError(
            f"{names} holds no text; expected text of the kind that the model will see, some "
            "thousands of words of it"
        )
    packed = np.array(ids, np.int64)
    contexts = tuple(packed[start : start + length] for start in range(0, len(packed), length))
    warnings = []
    if len(contexts[0]) <= spec.window_size and "local" in spec.attention_layers:
        warnings.append(
            f"no context is longer than the attention window ({len(contexts[0])} tokens, window "
            f"{spec.window_size}): what local layers do past it is not covered"
        )
    if len(ids) < _FEW:
        warnings.append(
            f"{len(ids)} tokens are little text: rare values were not seen; several thousand "
            "make the statistics sound"
        )
    return CalibrationText(
        contexts=contexts, max_length=length, files=digests, warnings=tuple(warnings)
    )


def _token_ids(
    files: Sequence[Path], checkpoint: Checkpoint, tokens: int
) -> tuple[list[int], dict[str, str]]:
    raw = checkpoint.tokenizer_json()
    if raw is None:
        raise StatisticsError(
            f"{checkpoint.folder} has no tokenizer, which calibration text needs; put its "
            "tokenizer.json (or vocab.json and merges.txt) there"
        )
    tokenizer = Tokenizer(raw)
    end = checkpoint.spec.separator
    ids: list[int] = []
    digests: dict[str, str] = {}
    for file in files:
        data = _read(file)
        digests[file.name] = hashlib.sha256(data).hexdigest()
        for document in _documents(file, data, _CHARACTERS * tokens):
            if len(ids) >= tokens:
                break
            found = tokenizer.encode(document, add_special_tokens=False)
            ids += [*found, *end] if found else []
    wrong = max(ids, default=0)
    if wrong >= checkpoint.spec.vocab_size:
        raise StatisticsError(
            f"the tokenizer of {checkpoint.folder} gives token {wrong}, the model has "
            f"{checkpoint.spec.vocab_size}; is it another model's tokenizer?"
        )
    return ids[:tokens], digests


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise StatisticsError(
            f"{file} cannot be read ({error.strerror}); expected a text or JSONL file"
        ) from error


def _documents(file: Path, data: bytes, characters: int) -> Iterator[str]:
    """Every document; of a text file no more than what surely gives enough tokens."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StatisticsError(f"{file} is not UTF-8 text ({error}); convert it") from error
    if file.suffix.lower() not in (".jsonl", ".json", ".ndjson"):
        if text.strip():
            yield text[:characters]
        return
    for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold other line breaks
        if line.strip():
            yield _document(file, number, line)


def _document(file: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise StatisticsError(f"{file}, line {number}: not JSON ({error})") from error
    if isinstance(value, dict):
        value = next((value[key] for key in _KEYS if key in value), None)
    if not isinstance(value, str):
        raise StatisticsError(
            f"{file}, line {number}: expected a string or an object with "
            f"{', '.join(map(repr, _KEYS))}"
        )
    return value
