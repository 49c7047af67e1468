"""Completions as JSON: a whole answer, and the events of a stream."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from neo_server.errors import shutting_down
from neo_server.logprobs import LogprobWriter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from neo_runtime.generation.completion import Completion
    from neo_runtime.generation.text_stream import Piece
    from neo_runtime.sampling.choice import Choice
    from neo_runtime.text.tokenizer import Tokenizer

    from neo_server.asked import Asked

__all__ = ["DONE", "ChoiceWriter", "Echo", "Frame", "Usage", "event"]

DONE = "data: [DONE]\n\n"
"""The last event of a stream."""

_Json = dict[str, Any]


def event(content: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


@dataclass
class Usage:
    """Tokens of a request: each prompt counted once, and all generated tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache; None if there is no prefix cache."""

    @property
    def json(self) -> _Json:
        """In OpenAI's format."""
        told: _Json = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        if self.cached_tokens is not None:
            told["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        return told


@dataclass(frozen=True)
class Frame:
    """The fields of an answer except its choices; the same in all events of a stream."""

    model: str
    fingerprint: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def around(self, choices: list[_Json], **more: Any) -> _Json:
        """An answer, or an event, with these choices."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }


@dataclass(frozen=True)
class Echo:
    """A prompt repeated before its continuation (option `echo`)."""

    text: str
    first_token: int
    scores: list[Choice] | None
    """Scores of all tokens after the first, if log probabilities were requested."""


class ChoiceWriter:
    """Writes one choice: `begin`, a `piece` at a time, `end`; or `whole`."""

    def __init__(self, index: int, asked: Asked, tokenizer: Tokenizer) -> None:
        """Begin with nothing written; `index` is that of the choice in the answer."""
        self._index = index
        self._writer = None
        if asked.logprobs is not None:
            self._writer = LogprobWriter(tokenizer, as_token_ids=asked.as_token_ids)
        self._told = 0

    def whole(self, echo: Echo | None, completion: Completion | None) -> _Json:
        """A whole choice; without a completion, only the prompt."""
        begun = self.begin(echo)
        ended = self.end(completion)
        text = begun["text"] + (completion.text or "" if completion is not None else "")
        logprobs = begun["logprobs"]
        if logprobs is not None:
            logprobs = {name: values + ended["logprobs"][name] for name, values in logprobs.items()}
        return ended | {"text": text, "logprobs": logprobs}

    def begin(self, echo: Echo | None) -> _Json:
        """The beginning of a choice: the prompt if it is echoed, or empty text."""
        if echo is None:
            return self._choice("", ())
        begun = self._choice(echo.text, ())
        if self._writer is not None:
            begun["logprobs"] = self._writer.prompt(echo.text, echo.first_token, echo.scores or ())
        return begun

    def piece(self, piece: Piece) -> _Json:
        """One piece of generated text."""
        self._told += len(piece.choices)
        return self._choice(piece, piece.choices)

    def end(self, completion: Completion | None) -> _Json:
        """The end of a choice: tokens after the last piece, and the finish reason.

        Raises:
            ApiError: the scheduler was closed before the completion was finished.
        """
        if completion is None:
            return self._choice("", (), "length")
        if completion.finish_reason == "cancelled":
            raise shutting_down()
        rest = (completion.logprobs or ())[self._told :]
        return self._choice("", rest, completion.finish_reason)

    def _choice(
        self, text: str, tokens: tuple[Choice, ...], finish_reason: str | None = None
    ) -> _Json:
        return {
            "index": self._index,
            "text": text,
            "logprobs": None if self._writer is None else self._writer.tokens(tokens),
            "finish_reason": finish_reason,
        }
