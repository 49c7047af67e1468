"""Text to token ids and back: a thin wrapper over the `tokenizers` package."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from neo_runtime.errors import BundleDamagedError, DependencyError, RequestError
from neo_runtime.options.values import why_no_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Tokenizer"]


class Tokenizer:
    """The tokenizer of a bundle (its `tokenizer.json`). Several threads may use it at once."""

    def __init__(self, source: Path | bytes) -> None:
        """Load a `tokenizer.json`: a file, or its contents.

        Raises:
            DependencyError: the package `tokenizers` is missing, or cannot be loaded.
            BundleDamagedError: the file cannot be read as a tokenizer.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise DependencyError(_why_not_imported(error)) from error
        try:
            self._tokenizer: Any = (
                tokenizers.Tokenizer.from_buffer(source)
                if isinstance(source, bytes)
                else tokenizers.Tokenizer.from_file(str(source))
            )
        except Exception as error:  # the package raises bare Exception
            name = "tokenizer.json" if isinstance(source, bytes) else source
            raise BundleDamagedError(
                f"{name} is not a tokenizer that tokenizers {tokenizers.__version__} can read "
                f"({error}); export the bundle again"
            ) from error
        # Settings of the training run that a file may hold; they must not truncate a prompt.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer knows, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def json(self) -> str:
        """The whole tokenizer, as `tokenizer.json` has it."""
        return str(self._tokenizer.to_str())

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token: a text of n of them has at least n tokens."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens that the file itself adds, if any.

        Raises:
            RequestError: `text` is not text, or holds an unpaired surrogate.
        """
        try:
            found = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise RequestError(f"{text!r} is not text: {why_no_text(text)}") from error
        ids: list[int] = found.ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        try:
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise RequestError(f"ids hold a number that is no token id: {error}") from error
        return text

    def token(self, token_id: int) -> str:
        """Text of one token, special ones included; U+FFFD for a part of a character."""
        return self.decode([token_id], skip_special_tokens=False)


def _why_not_imported(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "tokenizers":
        return "the package tokenizers is missing; install it with: pip install tokenizers"
    return (
        f"tokenizers is installed but cannot be loaded ({error}); give this process more memory "
        "where its limit is low (ulimit -v), else reinstall it: "
        "pip install --force-reinstall tokenizers"
    )
