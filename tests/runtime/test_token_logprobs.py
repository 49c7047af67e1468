"""Log probabilities of given tokens, and of those that a piece of a stream has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from helpers.hf_reference import heldout_texts, reference_logits, varied_prompts
from neo_runtime import Scheduler
from neo_runtime.errors import CacheLimitError, ContextLengthError, RequestError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from neo_runtime.model import Model
    from numpy.typing import NDArray


@pytest.fixture(scope="module")
def model(mini_bundle: Path) -> Iterator[Model]:
    # Chunks that are no divisor of anything here.
    with neo_runtime.load(mini_bundle, threads=1, prefill_chunk=50) as loaded:
        yield loaded


@pytest.mark.parametrize("length", [2, 50, 51, 52, 131, 188])
def test_they_are_pytorchs(model: Model, length: int) -> None:
    ids = varied_prompts()[4][:length]
    logits = reference_logits(ids).astype(np.float64)[:-1]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = model.token_logprobs(ids, top_logprobs=2)
    assert [choice.token for choice in found] == ids[1:]
    expected = logprobs[np.arange(length - 1), ids[1:]]
    assert [choice.logprob for choice in found] == pytest.approx(expected, abs=1e-4)
    for choice, row in zip(found, logprobs, strict=True):
        assert [t for t, _ in choice.top_logprobs or ()] == np.argsort(-row)[:2].tolist()


def test_as_long_as_the_model(model: Model) -> None:
    ids = (varied_prompts()[4] * 3)[:512]
    found = model.token_logprobs(ids)
    assert len(found) == 511
    assert found[0].top_logprobs == ()
    assert model.cache_bytes_in_use == 0
    with pytest.raises(ContextLengthError, match="513 tokens, but the model has 512 positions"):
        model.token_logprobs([*ids, 1])


def test_one_token_has_none(model: Model) -> None:
    assert model.token_logprobs([7]) == []


def test_text_is_taken(model: Model) -> None:
    text = heldout_texts()[0][:50]
    assert model.token_logprobs(text) == model.token_logprobs(model.tokenizer.encode(text))


def test_what_cannot_be_scored(model: Model, mini_bundle: Path) -> None:
    with pytest.raises(RequestError, match="empty"):
        model.token_logprobs([])
    with pytest.raises(RequestError, match="top_logprobs is -1"):
        model.token_logprobs("a b", top_logprobs=-1)
    with (
        neo_runtime.load(mini_bundle, threads=1, max_cache_bytes=1000) as small,
        pytest.raises(CacheLimitError),
    ):
        small.token_logprobs("a b")


def test_nan_is_no_probability(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = neo_runtime.Model.logits

    def broken(self: Model, ids: object, cache: object = None) -> object:
        found = logits(self, ids, cache)
        found[-1, 5] = np.nan
        return found

    monkeypatch.setattr(neo_runtime.Model, "logits", broken)
    with pytest.raises(VerificationError, match="nan"):
        model.token_logprobs("a b")


PROMPTS = ("Once upon a time", "é, 他说 and", heldout_texts()[3][:200])


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("way", ["stream", "scheduler", "guesses"])
def test_pieces_have_the_tokens_of_their_text(
    model: Model, prompt: str, logprobs: int | None, way: str
) -> None:
    # Parts of characters, and a stop string that holds text back.
    options = {"do_sample": True, "temperature": 2.5, "top_k": 0, "seed": 8, "stop": "the "}
    options |= {"max_new_tokens": 60, "logprobs": logprobs, "ignore_eos": True}
    options["logit_bias"] = dict.fromkeys(model.tokenizer.encode("他说é"), 25.0)
    if way == "scheduler":
        with Scheduler(model, max_batch_size=1) as scheduler:
            pending = scheduler.submit(prompt, **options)
            pieces = list(pending)
            completion = pending.result()
    else:
        drafter = neo_runtime.PromptLookup() if way == "guesses" else None
        with model.stream(prompt, drafter=drafter, **options) as stream:
            pieces = list(stream)
        completion = stream.completion
    assert "".join(pieces) == completion.text
    assert all(isinstance(piece, neo_runtime.Piece) and piece for piece in pieces)
    choices = [choice for piece in pieces for choice in piece.choices]
    assert tuple(choice.token for choice in choices) == completion.token_ids[: len(choices)]
    assert len(choices) > len(pieces)  # a token within a character goes with the next one's text
    if logprobs:
        assert tuple(choices) == (completion.logprobs or ())[: len(choices)]
    else:
        assert all(choice.logprob is None for choice in choices)
    decoded = model.tokenizer.decode(completion.token_ids[: len(choices)])
    assert decoded.startswith(completion.text or "")


def test_continuations_of_one_seed(model: Model) -> None:
    options = {"do_sample": True, "seed": 4, "max_new_tokens": 12}
    expected = model.generate(PROMPTS[0], num_return_sequences=3, **options)
    with Scheduler(model, max_batch_size=2) as scheduler:
        pending = [
            scheduler.submit(PROMPTS[0], sequence_index=index, **options) for index in range(3)
        ]
        assert [one.result().text for one in pending] == [one.text for one in expected]
        with pytest.raises(RequestError, match="sequence_index is -1"):
            scheduler.submit("a", sequence_index=-1)


def test_no_more_than_a_chunk_of_logits_is_held(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2048 tokens would be 400 MB."""
    logits, rows = model.logits, []

    def counted(*given: Any) -> NDArray[np.float32]:
        found = logits(*given)
        rows.append(len(found))
        return found

    monkeypatch.setattr(model, "logits", counted)
    assert len(model.token_logprobs(varied_prompts()[4])) == 187
    assert rows == [50, 50, 50, 37]


def test_whole_texts_are_scored_as_tokens_are(mini_bundle: Path) -> None:
    """By the same calls, within the limit for caches, the memory of a chunk at once."""
    ids = varied_prompts()[4]
    with neo_runtime.load(mini_bundle, threads=1, prefill_chunk=32) as model:
        logits = model.logits(ids).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        found = model.token_logprobs(ids)
        places = range(len(ids) - 1)
        assert [one.logprob for one in found] == [
            pytest.approx(logprobs[place, ids[place + 1]], abs=1e-6) for place in places
        ]
        assert model.cache_bytes_in_use == 0
        most = model.cache_bytes(1, len(ids))
    with neo_runtime.load(mini_bundle, threads=1, max_cache_bytes=most) as model:
        assert np.isfinite(model.logits(ids)).all()
        with pytest.raises(CacheLimitError):
            model.logits([*ids, *[5] * 16])
        with model.new_cache(1, len(ids)):
            assert model.token_logprobs(ids[:1]) == [], "there is nothing to compute"
