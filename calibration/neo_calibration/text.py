"""Reads calibration text as contexts of token ids, packed to full length."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from neo_export.statistics.header import FEWEST_POSITIONS
from neo_runtime.errors import RequestError, StatisticsError
from neo_runtime.text.documents import document_ids, read_documents
from neo_runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from neo_export.checkpoint.whole import Checkpoint
    from numpy.typing import NDArray

__all__ = ["CalibrationText", "read_text"]

_FEW = 1024


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """The contexts of a calibration run, and the files that they are from."""

    contexts: tuple[NDArray[np.int64], ...]
    """Token ids; each context starts at position 0. All but the last are `max_length` long."""
    max_length: int
    files: dict[str, str]
    """Name of each file → sha256 of its bytes."""
    warnings: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Total number of positions."""
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
    """Tokenize files and pack them into full contexts, up to a number of tokens.

    Args:
        files: files that `neo_runtime.text.documents.read_documents` can read.
        checkpoint: provides the tokenizer and the position table's length.
        tokens: largest number of positions in all.
        max_length: positions per context; None for all that the model has.

    Raises:
        StatisticsError: a file cannot be read, or there is no text or no tokenizer.
        RequestError: `max_length` or `tokens` is out of range, a file does not hold documents, or
            the tokenizer is another model's.
        CheckpointError: the model has no usable tokenizer.
    """
    spec = checkpoint.spec
    length = spec.max_position_embeddings if max_length is None else max_length
    if not 1 <= length <= spec.max_position_embeddings:
        raise RequestError(
            f"--max-length is {length}, expected 1 to {spec.max_position_embeddings}: the "
            "checkpoint's position table has no more rows"
        )
    if tokens < FEWEST_POSITIONS:
        raise RequestError(f"--tokens is {tokens}, expected at least {FEWEST_POSITIONS}")
    ids, digests = _token_ids(files, checkpoint, tokens)
    if len(ids) < FEWEST_POSITIONS:
        names = ", ".join(map(str, files))
        raise StatisticsError(
            f"{names} holds {'one token' if ids else 'no text'}; expected several thousand words "
            "of the kind of text that the model will see"
        )
    packed = np.array(ids, np.int64)
    contexts = tuple(packed[start : start + length] for start in range(0, len(packed), length))
    warnings = []
    if len(contexts[0]) <= spec.window_size and "local" in spec.attention_layers:
        warnings.append(
            f"no context is longer than the attention window ({len(contexts[0])} tokens, window "
            f"{spec.window_size}), so the statistics do not cover what local layers do beyond it; "
            "give more text, or a larger --max-length"
        )
    if len(ids) < _FEW:
        warnings.append(
            f"the text has only {len(ids)} tokens, so the statistics may lack rare values; give "
            "several thousand tokens"
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
    ids: list[int] = []
    digests: dict[str, str] = {}
    for file in files:
        data = _read(file)
        digests[file.name] = hashlib.sha256(data).hexdigest()
        wanted = tokens - len(ids)
        if wanted > 0:
            opened = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig")
            documents = read_documents(opened, str(file), wanted)
            found = document_ids(documents, tokenizer, checkpoint.spec, wanted)
            ids += [*checkpoint.spec.separator, *found] if ids and found else found
    return ids[:tokens], digests


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise StatisticsError(
            f"{file} cannot be read ({error.strerror}); give a readable file of text or JSON lines"
        ) from error
