"""Streaming: the pieces are the text, valid at every moment, and stop when nobody listens."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from helpers.hf_reference import varied_prompts
from helpers.models import DEMO
from hypothesis import given, settings
from hypothesis import strategies as st
from neo_runtime.errors import NeoError, RequestError
from neo_runtime.generation.text_stream import StopMatcher, StreamDecoder
from neo_runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from neo_runtime import Model

VOCABULARY = 4096


@pytest.fixture(scope="module")
def model(mini_bundle: Path) -> Iterator[Model]:
    with neo_runtime.load(mini_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO / "tokenizer.json")


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.finish()]


def test_pieces_of_any_tokens_are_their_text(tokenizer: Tokenizer) -> None:
    """Over the whole vocabulary, whose single bytes are mostly no UTF-8 when put together."""
    random = np.random.default_rng(0)
    single_bytes = [i for i in range(VOCABULARY) if "\ufffd" in tokenizer.token(i)]
    assert len(single_bytes) > 100
    for _ in range(150):
        ids = random.integers(0, VOCABULARY, 40).tolist()
        odd = random.choice([0, *single_bytes], 40).tolist()
        mixed = [token for pair in zip(ids, odd, strict=True) for token in pair]
        for tokens in (ids, odd, mixed):
            assert "".join(pieces_of(tokenizer, tokens)) == tokenizer.decode(tokens)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=30))
def test_characters_come_whole(text: str) -> None:
    tokenizer = Tokenizer(DEMO / "tokenizer.json")
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_split_character_is_held_back_and_an_incomplete_one_replaced(
    tokenizer: Tokenizer,
) -> None:
    ids = tokenizer.encode("a\N{SNOWMAN}b")
    assert len(ids) > 3
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in ids]
    assert pieces == ["a", *[""] * (len(ids) - 3), "\N{SNOWMAN}", "b"]
    assert pieces_of(tokenizer, ids[:2]) == ["a", "", "\ufffd"]


def test_the_work_for_a_token_does_not_grow(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    decode = tokenizer.decode

    def counted(ids: Any, **options: Any) -> str:
        sizes.append(len(ids))
        return decode(ids, **options)

    monkeypatch.setattr(tokenizer, "decode", counted)
    ids = [token for prompt in varied_prompts() for token in prompt]
    pieces_of(tokenizer, ids)
    assert len(ids) > 1000
    assert max(sizes) <= 10


@settings(deadline=None)
@given(
    parts=st.lists(st.text("abc", max_size=4), max_size=12),
    stop=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
)
def test_nothing_of_a_stop_string_passes(parts: list[str], stop: list[str]) -> None:
    matcher, passed, seen = StopMatcher(stop), "", ""
    for part in parts:
        seen += part
        passed += matcher.push(part)
        hits = [seen.find(s) for s in stop if s in seen]
        if hits:
            assert matcher.found in stop
            assert passed == seen[: min(hits)]
            assert matcher.push("more") + matcher.finish() == ""
            return
        assert matcher.found is None
        held = seen.removeprefix(passed)
        assert passed + held == seen
        # What is held could still become a stop string; what passed could not.
        starts = [i for i in range(len(seen)) if any(s.startswith(seen[i:]) for s in stop)]
        assert len(passed) == min(starts, default=len(seen))
    assert passed + matcher.finish() == seen


def test_the_stream_is_the_completion(model: Model) -> None:
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 60},
        {"max_new_tokens": 60, "stop": "girl named"},
        {"max_new_tokens": 60, "do_sample": True, "seed": 5, "top_k": 0, "temperature": 3.0},
        {"max_new_tokens": 1, "ignore_eos": True},
    ]
    for chosen in options:
        whole = model.generate("Once upon a time", **chosen)
        stream = model.stream("Once upon a time", **chosen)
        with pytest.raises(NeoError, match="not ended"):
            _ = stream.completion
        pieces = list(stream)
        assert "".join(pieces) == whole.text
        assert all(pieces)
        assert stream.completion.token_ids == whole.token_ids
        assert stream.completion.text == whole.text
        assert stream.completion.stop == whole.stop
        assert list(stream) == []
    assert model.cache_bytes_in_use == 0


def test_requests_are_checked_before_the_first_piece(model: Model) -> None:
    for prompt, options in (
        ("", {}),
        (["a", "b"], {}),
        ("a", {"num_beams": 2}),
        ("a", {"do_sample": True, "num_return_sequences": 2}),
        ("a", {"max_new_tokens": 512}),
    ):
        with pytest.raises(RequestError):
            model.stream(prompt, **options)  # type: ignore[arg-type]


@pytest.fixture
def decoded(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each decode step of the model."""
    counted: list[int] = []
    decode = model.decode_step

    def count(*arguments: Any) -> Any:
        counted.append(1)
        return decode(*arguments)

    monkeypatch.setattr(model, "decode_step", count)
    return counted


def test_closing_stops_at_once_and_frees_the_cache(model: Model, decoded: list[int]) -> None:
    unread = model.stream("Once", ignore_eos=True)
    unread.close()
    assert list(unread) == []

    stream = model.stream("Once", ignore_eos=True)
    next(stream)
    assert model.cache_bytes_in_use == model.cache_bytes(1, 256)
    next(stream)
    before = len(decoded)
    stream.close()
    assert model.cache_bytes_in_use == 0
    assert list(stream) == []

    with model.stream("Once", ignore_eos=True) as stream:
        next(stream)
        before = len(decoded)
    assert model.cache_bytes_in_use == 0

    stream = model.stream("Once", ignore_eos=True)
    next(stream)
    before = len(decoded)
    del stream
    gc.collect()
    assert model.cache_bytes_in_use == 0
    assert len(decoded) == before


def test_a_failing_consumer_frees_the_cache(model: Model) -> None:
    def consume() -> None:
        with model.stream("Once", ignore_eos=True) as stream:
            for _ in stream:
                assert model.cache_bytes_in_use > 0
                raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        consume()
    assert model.cache_bytes_in_use == 0


def test_a_piece_that_comes_after_close_is_dropped(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader may ask for no other: nothing may wait for that."""
    stream = model.stream("Once", ignore_eos=True)
    next(stream)
    decode = model.decode_step

    def closed_meanwhile(*arguments: Any) -> Any:
        closer = threading.Thread(target=stream.close)
        closer.start()
        closer.join()
        return decode(*arguments)

    monkeypatch.setattr(model, "decode_step", closed_meanwhile)
    assert next(stream, None) is None
    assert model.cache_bytes_in_use == 0


def test_another_thread_may_close(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a step: the step ends, and no further one begins."""
    stream = model.stream("Once", ignore_eos=True)
    next(stream)
    inside, go_on = threading.Event(), threading.Event()
    decode, calls = model.decode_step, []

    def slow(*arguments: Any) -> Any:
        calls.append(1)
        inside.set()
        assert go_on.wait(timeout=60)
        return decode(*arguments)

    monkeypatch.setattr(model, "decode_step", slow)
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    assert inside.wait(timeout=60)
    stream.close()
    go_on.set()
    reader.join()
    assert len(calls) <= 2  # a step without text is followed by one more
    assert model.cache_bytes_in_use == 0


def test_two_threads_at_one_stream(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model.generate("Once", max_new_tokens=8)
    stream = model.stream("Once", max_new_tokens=8)
    inside, go_on = threading.Event(), threading.Event()
    decode = model.decode_step

    def slow(*arguments: Any) -> Any:
        inside.set()
        assert go_on.wait(timeout=60)
        return decode(*arguments)

    monkeypatch.setattr(model, "decode_step", slow)
    pieces: list[str] = []
    reader = threading.Thread(target=lambda: pieces.extend(stream))
    reader.start()
    assert inside.wait(timeout=60)
    with pytest.raises(NeoError, match="another thread is reading"):
        next(stream)
    go_on.set()
    reader.join()
    assert "".join(pieces) == whole.text
    assert stream.completion.text == whole.text


def test_why_there_is_no_completion(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = model.stream("Once", ignore_eos=True)
    next(stream)
    with pytest.raises(NeoError, match="has not ended yet"):
        _ = stream.completion
    stream.close()
    with pytest.raises(NeoError, match="was closed, or failed, before its end"):
        _ = stream.completion

    def fail(*_: object) -> None:
        raise RequestError("no")

    failing = model.stream("Once", ignore_eos=True)
    monkeypatch.setattr(model, "decode_step", fail)
    with pytest.raises(RequestError, match=r"^no$"):
        list(failing)
    with pytest.raises(NeoError, match="was closed, or failed"):
        _ = failing.completion
