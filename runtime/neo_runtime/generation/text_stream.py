"""Text as it is generated: pieces of valid UTF-8, cut before a stop string.

    token ids ──StreamDecoder──▶ text ──StopMatcher──▶ text that is certainly part of the result

Both hold back text that the next token may still change: an incomplete character, or the beginning
of a stop string. All pieces together are the text of the completion.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from neo_runtime.closable import Closable
from neo_runtime.errors import NeoError

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence
    from typing import Self

    from neo_runtime.generation.completion import Completion
    from neo_runtime.sampling.choice import Choice
    from neo_runtime.text.tokenizer import Tokenizer

__all__ = ["Piece", "StopMatcher", "StreamDecoder", "TextStream"]

_IN_USE = "generator already executing"
"""Python's message if two threads advance one generator at once."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Piece(str):
    """A piece of text that no later token changes, and its tokens.

    Tokens that complete no text, such as those inside a character, belong to the next piece. Tokens
    after the last piece, such as the end-of-sequence token, are only in the completion.
    """

    __slots__ = ("choices",)

    choices: tuple[Choice, ...]
    """The tokens since the last piece, with log probabilities if the option `logprobs` is set."""

    def __new__(cls, text: str, choices: Sequence[Choice] = ()) -> Self:
        """Text with its tokens."""
        piece = super().__new__(cls, text)
        piece.choices = tuple(choices)
        return piece


class StreamDecoder:
    """Decode token by token; the pieces together are `tokenizer.decode` of all tokens.

    A token's text may depend on the tokens before it, so a window of tokens is decoded twice:
    up to the last token whose text was returned, and up to the newest one. The difference is
    the new text. (The technique of text-generation-inference.) The window moves on whenever the
    text does not end inside a character, so the work per token does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._window: list[int] = []
        self._given_tokens = 0
        self._given_text = ""

    def push(self, token: int) -> str:
        """The text that this token completes; "" inside a character or for a special token."""
        self._window.append(token)
        text = self._decoded()
        if text.endswith(_REPLACEMENT):
            return ""
        return self._give(text)

    def finish(self) -> str:
        """The rest: an incomplete character as U+FFFD."""
        return self._give(self._decoded())

    def _give(self, text: str) -> str:
        piece = text[len(self._given_text) :]
        self._window = self._window[self._given_tokens :]
        self._given_tokens = len(self._window)
        self._given_text = self._decoded()
        return piece

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skips)


class StopMatcher:
    """Pass text through up to the first stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str) -> str:
        """The part of the text so far that is new and cannot belong to a stop string."""
        if self.found is not None:
            return ""
        self._held += text
        places = [(self._held.find(stop), -len(stop), stop) for stop in self._stop]
        hits = [place for place in places if place[0] >= 0]
        if hits:
            # The earliest place; of those, the longest string.
            end, _, self.found = min(hits)
            passed, self._held = self._held[:end], ""
            return passed
        held = max((self._overlap(stop) for stop in self._stop), default=0)
        split = len(self._held) - held
        passed, self._held = self._held[:split], self._held[split:]
        return passed

    def finish(self) -> str:
        """The text held back for a stop string that did not follow."""
        passed, self._held = self._held, ""
        return passed

    def _overlap(self, stop: str) -> int:
        """Length of the longest suffix of the held text that is a prefix of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class TextStream(Iterator[Piece], Closable):
    """The pieces of one completion, in order. Also a context manager that closes it.

    Tokens are computed only when pieces are requested: a consumer that stops iterating stops the
    work. `close`, leaving a `with` block or garbage collection of the stream frees the KV cache.
    """

    def __init__(
        self, pieces: Generator[Piece, None, Completion | None], closed: threading.Event
    ) -> None:
        """Wrap a generator.

        Args:
            pieces: yields text and returns the completion, or None if it was closed before the end.
            closed: set by `close`; `pieces` checks it after each token.
        """
        self._pieces = pieces
        self._closed = closed
        self._completion: Completion | None = None
        self._has_failed = False

    def __next__(self) -> Piece:
        if self._closed.is_set():
            self.close()
            raise StopIteration
        try:
            piece = next(self._pieces)
        except StopIteration as end:
            if end.value is not None:
                self._completion = end.value
            raise StopIteration from None
        except BaseException as error:
            if isinstance(error, ValueError) and str(error) == _IN_USE:
                raise NeoError(
                    "another thread is reading this stream right now; read it in one thread, or "
                    "give each a stream of its own"
                ) from error
            self._has_failed = True
            raise
        if self._closed.is_set():  # by another thread, meanwhile
            self.close()
            raise StopIteration
        return piece

    @property
    def completion(self) -> Completion:
        """The whole result, available after the last piece.

        Raises:
            NeoError: the stream was not read to its end.
        """
        if self._completion is not None:
            return self._completion
        if self._closed.is_set() or self._has_failed:
            raise NeoError(
                "the stream was closed, or failed, before its end, so there is no completion; read "
                "all pieces of another one"
            )
        raise NeoError("the stream has not ended yet; read all its pieces first")

    def close(self) -> None:
        """Stop and free the KV cache; called from another thread, before the next token."""
        self._closed.set()
        try:
            self._pieces.close()
        except ValueError:
            # Another thread is computing a token; it closes the stream when that is done.
            return
