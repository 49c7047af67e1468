"""Log probabilities in the form of OpenAI's text completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neo_runtime.generation.text_stream import StreamDecoder

if TYPE_CHECKING:
    from collections.abc import Iterable

    from neo_runtime.sampling.row_sampler import Choice
    from neo_runtime.text.tokenizer import Tokenizer

__all__ = ["LogprobWriter"]


class LogprobWriter:
    """Writes the tokens of one choice, in order: those of an echoed prompt, then the new ones.

    Four lists as long as there are tokens: `tokens`, their text; `token_logprobs`; `top_logprobs`,
    an object {text: log probability} with the token itself and the most probable ones; and
    `text_offset`, the characters of the choice's text before it. The first token of a prompt has
    no probability: null.
    """

    def __init__(self, tokenizer: Tokenizer, *, as_token_ids: bool) -> None:
        """Begin at offset 0.

        Args:
            tokenizer: makes the text.
            as_token_ids: name tokens "token_id:123": several may have the same text, as parts of
                characters have.
        """
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids
        self._decoder = StreamDecoder(tokenizer)
        self._offset = 0

    def prompt(self, first: int, others: Iterable[Choice]) -> dict[str, list[Any]]:
        """Of an echoed prompt: its first token, and the others with their log probabilities."""
        lists = self._lists(first, None, None)
        for name, values in self.tokens(others).items():
            lists[name] += values
        return lists

    def tokens(self, choices: Iterable[Choice]) -> dict[str, list[Any]]:
        """Of the next tokens."""
        lists: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        for choice in choices:
            top = {self._name(choice.token): choice.logprob}
            for token, logprob in choice.top_logprobs or ():
                top.setdefault(self._name(token), logprob)
            for name, values in self._lists(choice.token, choice.logprob, top).items():
                lists[name] += values
        return lists

    def _lists(
        self, token: int, logprob: float | None, top: dict[str, float | None] | None
    ) -> dict[str, list[Any]]:
        offset = self._offset
        self._offset += len(self._decoder.push(token))
        return {
            "tokens": [self._name(token)],
            "token_logprobs": [logprob],
            "top_logprobs": [top],
            "text_offset": [offset],
        }

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._as_token_ids else self._tokenizer.token(token)
