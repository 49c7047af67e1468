"""A bundle's tokenizer: a thin wrapper around the `tokenizers` package."""

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
    """The tokenizer of a bundle (its `tokenizer.json`). Thread-safe."""

    def __init__(self, source: Path | bytes) -> None:
        """Load a `tokenizer.json`.

        Args:
            source: path of the file, or its contents.

        Raises:
            DependencyError: the package `tokenizers` is missing, or cannot be loaded.
            BundleDamagedError: the file is not a valid tokenizer.
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
        # The file may contain truncation and padding settings of its training run.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def json(self) -> str:
        """The tokenizer in the JSON format of `tokenizer.json`."""
        return str(self._tokenizer.to_str())

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token: a text of n of them has at least n tokens."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`.

        Args:
            text: any text.
            add_special_tokens: add the special tokens that `tokenizer.json` defines for a text.

        Raises:
            RequestError: `text` is not a string, or contains an unpaired surrogate.
        """
        try:
            found = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise RequestError(f"{text!r} is not text: {why_no_text(text)}") from error
        ids: list[int] = found.ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD.

        Raises:
            RequestError: a number is negative or too large for a token id.
        """
        try:
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise RequestError(
                f"ids contain a number that is not a token id ({error}); expected 0 to "
                f"{self.vocab_size - 1}"
            ) from error
        return text

    def token(self, token_id: int) -> str:
        """The text of one token, special tokens included; U+FFFD for a partial character."""
        return self.decode([token_id], skip_special_tokens=False)


def _why_not_imported(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "tokenizers":
        return "the package tokenizers is missing; install it with: pip install tokenizers"
    return (
        f"tokenizers is installed but cannot be loaded ({error}); if this process has a memory "
        "limit (ulimit -v), raise it, else reinstall the package: "
        "pip install --force-reinstall tokenizers"
    )
