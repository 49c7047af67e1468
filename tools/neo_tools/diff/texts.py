"""The texts that a bundle is compared on, as contexts of token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from neo_runtime.errors import RequestError
from neo_runtime.text.documents import document_ids, read_documents

if TYPE_CHECKING:
    from neo_runtime.bundle.manifest import ModelSpec
    from neo_runtime.text.tokenizer import Tokenizer
    from numpy.typing import NDArray

__all__ = ["Texts", "built_in_texts", "decode_segments", "read_texts"]


@dataclass(frozen=True)
class Texts:
    """The contexts of a text, none longer than the model allows."""

    source: str
    contexts: tuple[NDArray[np.int64], ...]
    """Token ids [S] each, at least two."""
    warnings: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens in all contexts."""
        return sum(map(len, self.contexts))


def built_in_texts() -> Path:
    """The held-out stories that come with the package: JSON lines with a `text` each."""
    import neo_export

    return Path(neo_export.__file__).parent / "demo" / "neo-mini" / "heldout.jsonl"


def read_texts(
    path: Path | None,
    tokenizer: Tokenizer | None,
    model: ModelSpec,
    *,
    tokens: int,
    context: int,
) -> Texts:
    """Read texts and cut them into contexts.

    Args:
        path: a file that `neo_runtime.text.documents.read_documents` can read; None for the texts
            that come with the package.
        tokenizer: the bundle's tokenizer.
        model: the bundle's model.
        tokens: largest number of tokens in all.
        context: largest number of tokens per context.

    Raises:
        RequestError: there is no tokenizer or another model's, or the file cannot be read or has
            no text.
    """
    chosen = built_in_texts() if path is None else path
    if tokenizer is None:
        raise RequestError(
            "the bundle has no tokenizer, so texts cannot be turned into token ids; "
            "export it again from a folder with a tokenizer.json"
        )
    ids = _token_ids(chosen, tokenizer, model, tokens)
    if len(ids) < 2:
        raise RequestError(
            f"{chosen} holds {'no text' if not ids else 'a single token'}; "
            "expected at least two tokens, better more than a window"
        )
    contexts = _contexts(np.array(ids, dtype=np.int64), context)
    source = "the texts that come with neo-onnx" if path is None else str(path)
    warnings = _coverage_warnings(contexts, model)
    return Texts(source, tuple(contexts), tuple(warnings))


def decode_segments(length: int, window: int, positions: int | None) -> tuple[tuple[int, int], ...]:
    """The positions of a context that go through decode, one token at a time: (start, stop) each.

    A fifth of them is at the start, a fifth around the window's end, a fifth from just before the
    first step that evicts from a local layer's cache (`neo_runtime.backends.base.layer_lengths`),
    and a fifth at the end of the context. The rest are single positions, evenly spaced.

    Args:
        length: length of the context.
        window: window of local layers.
        positions: number of positions in all; None for every position.
    """
    if positions is None or positions >= length:
        return ((0, length),)
    fifth, evicts = max(1, positions // 5), window + window // 4
    around = sorted(range(length), key=lambda at: abs(at - window))
    alone = max(0, positions - 4 * fifth)
    wanted = [
        *range(fifth),
        *range(length - fifth, length),
        *around[:fifth],
        *range(evicts - 2, evicts - 2 + fifth),
        *((number + 1) * length // (alone + 1) for number in range(alone)),
        *around,  # replacements for duplicates and for positions after the context
    ]
    inside = dict.fromkeys(at for at in wanted if 0 <= at < length)
    chosen = np.zeros(length + 2, dtype=np.int8)
    chosen[np.array(list(inside)[: max(positions, 2 * fifth)]) + 1] = 1
    edges = np.diff(chosen)
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))


def _token_ids(path: Path, tokenizer: Tokenizer, model: ModelSpec, tokens: int) -> list[int]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            documents = read_documents(file, str(path), tokens)
            return document_ids(documents, tokenizer, model, tokens)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error


def _contexts(ids: NDArray[np.int64], length: int) -> list[NDArray[np.int64]]:
    """Pieces of `length`; a last piece of a single token predicts nothing and is left out."""
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]


def _coverage_warnings(contexts: list[NDArray[np.int64]], model: ModelSpec) -> list[str]:
    longest, window = max(map(len, contexts)), model.window_size
    if "local" in model.attention_layers and longest <= window:
        return [
            f"the longest context has {longest} tokens and the attention window {window}: nothing "
            "past the window is covered, so a wrong window would not be seen; give a longer text"
        ]
    end = model.max_position_embeddings
    if longest < end:
        return [
            f"the longest context has {longest} tokens and the model {end} positions: positions "
            f"{longest} to {end - 1} are not covered"
        ]
    return []
