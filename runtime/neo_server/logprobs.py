"""Log probabilities in the form of OpenAI's text completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neo_runtime.generation.text_stream import StreamDecoder
from neo_runtime.sampling.choice import Choice

if TYPE_CHECKING:
    from collections.abc import Iterable

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

    def prompt(self, text: str, first: int, others: Iterable[Choice]) -> dict[str, list[Any]]:
        """Of an echoed prompt: its text, its first token, and the others with probabilities."""
        shown, self._decoder = (
            self._decoder,
            StreamDecoder(self._tokenizer, skip_special_tokens=False),
        )
        lists = self._written([Choice(first, None, None), *others])
        lists["top_logprobs"][0] = None
        # What follows is decoded by itself, as its text is.
        self._decoder, self._offset = shown, len(text)
        return lists

    def tokens(self, choices: Iterable[Choice]) -> dict[str, list[Any]]:
        """Of the next tokens."""
        return self._written(choices)

    def _written(self, choices: Iterable[Choice]) -> dict[str, list[Any]]:
        names: list[str] = []
        tops: list[dict[str, float | None] | None] = []
        logprobs: list[float | None] = []
        offsets: list[int] = []
        for choice in choices:
            names.append(self._name(choice.token))
            logprobs.append(choice.logprob)
            tops.append(self._top(choice))
            offsets.append(self._offset)
            self._offset += len(self._decoder.push(choice.token))
        return {
            "tokens": names,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, choice: Choice) -> dict[str, float | None]:
        """Of tokens with the same text the best one."""
        top: dict[str, float | None] = {}
        for token, logprob in choice.top_logprobs or ():
            top.setdefault(self._name(token), logprob)
        top.setdefault(self._name(choice.token), choice.logprob)
        return top

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._as_token_ids else self._tokenizer.token(token)
