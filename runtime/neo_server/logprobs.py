"""Log probabilities in the format of OpenAI's text completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neo_runtime.generation.text_stream import StreamDecoder
from neo_runtime.sampling.choice import Choice

if TYPE_CHECKING:
    from collections.abc import Iterable

    from neo_runtime.text.tokenizer import Tokenizer

__all__ = ["LogprobWriter"]


class LogprobWriter:
    """Writes the tokens of one choice in order: those of an echoed prompt, then the generated ones.

    Each call returns four lists with one entry per token: `tokens`, its text; `token_logprobs`, its
    log probability; `top_logprobs`, an object {text: log probability} of the most probable tokens
    and the token itself; and `text_offset`, the number of characters of the choice's text before
    it. For the first token of a prompt, which has no probability, `token_logprobs` and
    `top_logprobs` are None.
    """

    def __init__(self, tokenizer: Tokenizer, *, as_token_ids: bool) -> None:
        """Begin at offset 0.

        Args:
            tokenizer: decodes the tokens.
            as_token_ids: name tokens "token_id:123" instead of by their text. Texts can be
                ambiguous: tokens that are parts of characters have the same text.
        """
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids
        self._decoder = StreamDecoder(tokenizer)
        self._offset = 0

    def prompt(self, text: str, first: int, others: Iterable[Choice]) -> dict[str, list[Any]]:
        """The lists for an echoed prompt.

        Args:
            text: the text of the prompt.
            first: its first token.
            others: its other tokens, with log probabilities.
        """
        shown, self._decoder = (
            self._decoder,
            StreamDecoder(self._tokenizer, skip_special_tokens=False),
        )
        lists = self._written([Choice(first, None, None), *others])
        lists["top_logprobs"][0] = None
        # The continuation is decoded separately from the prompt, as its text is.
        self._decoder, self._offset = shown, len(text)
        return lists

    def tokens(self, choices: Iterable[Choice]) -> dict[str, list[Any]]:
        """The lists for the next generated tokens."""
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
        """The most probable tokens; of several with the same text, only the best."""
        top: dict[str, float | None] = {}
        for token, logprob in choice.top_logprobs or ():
            top.setdefault(self._name(token), logprob)
        top.setdefault(self._name(choice.token), choice.logprob)
        return top

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._as_token_ids else self._tokenizer.token(token)
