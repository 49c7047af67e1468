"""Guessed tokens change when logits are computed, and no text."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from helpers.guessing import assert_guesses_change_nothing
from helpers.hf_reference import reference_continuations, varied_prompts
from helpers.models import DEMO, TinyConfig, make_checkpoint
from neo_export.exporter import ExportOptions, export_bundle
from neo_runtime import Drafter, DraftModel, PromptLookup
from neo_runtime.backends.cpu.binding import BoundCall
from neo_runtime.command.generate import main
from neo_runtime.command.many_prompts import completed
from neo_runtime.errors import CacheLimitError, ContextLengthError, NeoError, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from neo_runtime import Model
    from neo_runtime.cached_model import CachedModel
    from neo_runtime.generation.drafting import Propose

    IntArray = np.ndarray[tuple[int], np.dtype[np.int64]]


class Oracle(Drafter):
    """Knows how texts go on, and lies in places."""

    def __init__(self, text: tuple[int, ...], lies: int = 0) -> None:
        self.text, self.lies = np.array(text), lies
        self.asked: list[tuple[int, int]] = []

    def begin(self, model: CachedModel, length: int) -> AbstractContextManager[Propose]:
        return nullcontext(self.propose)

    def propose(self, ids: IntArray, most: int) -> IntArray:
        self.asked.append((len(ids), most))
        guess = self.text[len(ids) : len(ids) + most].copy()
        if self.lies:
            guess[self.lies - 1 :: self.lies] ^= 1
        return guess


@pytest.fixture(scope="module", params=["mini_bundle", "portable_bundle"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with neo_runtime.load(request.getfixturevalue(request.param), threads=1) as loaded:
        yield loaded


def test_the_texts_of_transformers(model: Model) -> None:
    """Over the window of 64, its cache of 80 and several evictions."""
    prompts = varied_prompts(5)
    length: dict[str, Any] = {"max_new_tokens": 60, "min_new_tokens": 60}
    for more in ({}, {"repetition_penalty": 1.2}):
        expected = reference_continuations(prompts, do_sample=False, **length, **more)
        for drafter in (PromptLookup(), DraftModel(model, 5, 0)):
            found = model.generate(prompts, drafter=drafter, **length, **more)
            assert [[one.token_ids] for one in found] == expected
    assert model.cache_bytes_in_use == 0


def test_wherever_guesses_fail(model: Model) -> None:
    prompt = varied_prompts(4)[3]
    options: dict[str, Any] = {"max_new_tokens": 120, "min_new_tokens": 120}
    alone = model.generate(prompt, **options).token_ids
    for lies in (0, 1, 2, 3, 4, 7, 20):
        oracle = Oracle((*prompt, *alone), lies)
        found = model.generate(prompt, drafter=oracle, **options)
        assert found.token_ids == alone, lies
        times = found.timings
        assert times.accepted_draft_tokens <= times.draft_tokens
        if lies == 0:
            assert times.draft_tokens == times.accepted_draft_tokens > 90
            assert len(oracle.asked) < 30
            assert [most for _, most in oracle.asked[:3]] == [2, 4, 8]
        if lies == 1:
            assert times.accepted_draft_tokens == 0
            assert max(most for _, most in oracle.asked[1:]) == 1, "they cost as little as can be"
        assert len(prompt) + 120 not in [length for length, _ in oracle.asked]
        assert max(length + most for length, most in oracle.asked) <= len(prompt) + 119


# Several tokens are multiplied by another kernel than one, whose sums round otherwise before
# activations become integers: at most 0.011 (int8) and 0.078 (int4) in 2,100 tokens of 30 prompts.
@pytest.mark.parametrize(("precision", "tolerance"), [("int8", 0.05), ("int4", 0.2)])
def test_quantized(precision: str, tolerance: float, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    export_bundle(str(DEMO), bundle, ExportOptions(precision=precision))
    with neo_runtime.load(bundle, threads=1) as model:
        assert_guesses_change_nothing(model, tolerance)


def test_draws_are_those_without(model: Model) -> None:
    for seed in range(3):
        options: dict[str, Any] = {
            "do_sample": True,
            "seed": seed,
            "top_p": 0.9,
            "max_new_tokens": 70,
            "logprobs": 2,
        }
        for prompt in varied_prompts(3):
            alone = model.generate(prompt, **options)
            for drafter in (PromptLookup(4, 1, 1), DraftModel(model)):
                found = model.generate(prompt, drafter=drafter, **options)
                assert found.token_ids == alone.token_ids
                assert found.text == alone.text
                assert found.logprobs is not None
                assert alone.logprobs is not None
                assert [one.logprob for one in found.logprobs] == pytest.approx(
                    [one.logprob for one in alone.logprobs], abs=1e-4
                )


def test_each_prompt_has_its_seed(model: Model) -> None:
    prompts = ["Once upon a time", "Once upon a time", "The dog"]
    options: dict[str, Any] = {"do_sample": True, "seed": (5, 6, 7), "max_new_tokens": 20}
    alone = model.generate(prompts, **options)
    found = model.generate(prompts, drafter=PromptLookup(), **options)
    assert [one.text for one in found] == [one.text for one in alone]
    assert found[0].text != found[1].text


def test_lines_are_printed_one_by_one(model: Model) -> None:
    """Guesses are for one prompt at a time, and each is out before the next is computed."""
    prompts = ["Tom", "The", "A"]
    expected = [one.text for one in model.generate(prompts, max_new_tokens=3)]
    chosen = model.options(max_new_tokens=3)
    found = completed(model, prompts, chosen, None, drafter=PromptLookup())
    assert next(found)[1].text == expected[0]
    assert model.cache_bytes_in_use == 0
    assert [(place, one.text) for place, one in found] == [(1, expected[1]), (2, expected[2])]


def test_every_way_to_end(model: Model) -> None:
    prompt = "Once upon a time"
    whole = model.generate(prompt, max_new_tokens=60)
    assert whole.text is not None
    known = Oracle((*whole.prompt_token_ids, *whole.token_ids))
    for options in (
        {"stop": [whole.text[20:25]]},
        {"eos_token_id": whole.token_ids[10]},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"max_new_tokens": 3},
        {"max_length": len(whole.prompt_token_ids) + 9},
    ):
        alone = model.generate(prompt, **options)
        found = model.generate(prompt, drafter=known, **options)
        assert (found.text, found.token_ids) == (alone.text, alone.token_ids)
        assert (found.finish_reason, found.stop) == (alone.finish_reason, alone.stop)
        stream = model.stream(prompt, drafter=known, **options)
        assert "".join(stream) == alone.text
        assert stream.completion.token_ids == alone.token_ids
    times = model.generate(prompt, drafter=known, eos_token_id=whole.token_ids[6]).timings
    assert (times.draft_tokens, times.accepted_draft_tokens) == (6, 5), "the last one as well"
    calls = iter(range(100))
    ended = model.generate(prompt, drafter=known, should_stop=lambda: next(calls) == 7)
    assert (ended.finish_reason, len(ended.token_ids)) == ("cancelled", 7)
    never_begun = model.generate([prompt, prompt], drafter=known, should_stop=lambda: True)
    assert [one.token_ids for one in never_begun] == [(), ()]
    with model.stream(prompt, drafter=DraftModel(model), max_new_tokens=60) as stream:
        next(stream)
        assert model.cache_bytes_in_use
    assert model.cache_bytes_in_use == 0


def test_graphs_are_loaded_before_the_clock(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(model._backend, "prepare", loaded.append)
    lookup = PromptLookup()
    model.generate([5, 6, 5, 6], max_new_tokens=3, drafter=lookup)
    assert loaded == [("prefill", "decode", "score")]

    class Never(Drafter):
        def begin(self, model: CachedModel, length: int) -> AbstractContextManager[Propose]:
            raise AssertionError

    model.generate([5, 6, 5, 6], max_new_tokens=1, drafter=Never())
    assert len(loaded) == 1, "one token needs no guess"


def test_the_drafter_ends_before_the_cache(model: Model) -> None:
    ended: list[int] = []

    class Held(Drafter):
        @contextmanager
        def begin(self, model: CachedModel, length: int) -> Iterator[Propose]:
            try:
                yield lambda ids, most: ids[:0]
            finally:
                ended.append(model.cache_bytes_in_use)

    class Broken(Held):
        @contextmanager
        def begin(self, model: CachedModel, length: int) -> Iterator[Propose]:
            with super().begin(model, length):
                yield lambda ids, most: ids[most // 0 :]

    model.generate("Once", drafter=Held(), max_new_tokens=3)
    with model.stream("Once", drafter=Held(), max_new_tokens=30) as stream:
        next(stream)
    for call in (model.generate, lambda *a, **o: list(model.stream(*a, **o))):
        with pytest.raises(ZeroDivisionError):
            call("Once", drafter=Broken(), max_new_tokens=30)
    assert len(ended) == 4
    assert min(ended) > 0
    assert model.cache_bytes_in_use == 0


def test_up_to_the_last_position(model: Model) -> None:
    most = model.manifest.max_length
    prompt = (varied_prompts(5)[4] * 3)[: most - 40]
    alone = model.generate(prompt, max_new_tokens=40, ignore_eos=True)
    for drafter in (PromptLookup(), DraftModel(model, 3, 0)):
        found = model.generate(prompt, max_new_tokens=40, ignore_eos=True, drafter=drafter)
        assert found.token_ids == alone.token_ids
    with pytest.raises(ContextLengthError, match=r"prompts\[1\]: .*max_new_tokens"):
        model.generate([[1], prompt], max_new_tokens=41, drafter=PromptLookup())


def test_behind_a_prefix(model: Model) -> None:
    ids = varied_prompts(3)[2]
    alone = model.generate(ids, max_new_tokens=30)
    with model.prefix(ids[:100]) as prefix:
        for drafter in (PromptLookup(), DraftModel(model)):
            found = model.generate(ids[100:], prefix=prefix, drafter=drafter, max_new_tokens=30)
            assert found.token_ids == alone.token_ids


def test_what_lookup_finds(model: Model) -> None:
    def guess(ids: list[int], most: int = 10, **options: int) -> list[int]:
        with PromptLookup(**options).begin(model, 100) as propose:
            return propose(np.array(ids), most).tolist()

    assert guess([1, 2, 3, 4, 9, 1, 2], num_tokens=3) == [3, 4, 9]
    assert guess([1, 2, 3, 4, 9, 1, 2], 2) == [3, 4]
    assert guess([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], num_tokens=2) == [4, 9], "the latest"
    assert guess([7, 1, 2, 3, 9, 5, 2, 4, 1, 2], num_tokens=2) == [3, 9], "the longest"
    assert guess(
        [7, 1, 2, 3, 9, 5, 2, 4, 1, 2], num_tokens=2, max_ngram_size=1, min_ngram_size=1
    ) == [4, 1]
    assert guess([5, 6, 5, 6, 5], num_tokens=5) == [6, 5, 6, 5, 6], "a period goes on"
    assert guess([5, 5, 5]) == [5] * 10
    assert guess([7, 5, 7]) == []
    assert guess([7, 5, 7], 1, min_ngram_size=1) == [5]
    assert guess([1, 2, 3]) == []
    assert guess([1]) == []
    long = [1, 2, 3, 4, 5, 9, 0, 4, 5, 8, 1, 2, 3, 4, 5]
    assert guess(long, 1, max_ngram_size=9) == [9]
    assert guess(long, 1, max_ngram_size=9, min_ngram_size=6) == []
    assert guess(long, 1) == [9]
    assert guess(long, 1, max_ngram_size=2) == [8]


def test_a_draft_model_reads_every_token_once(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over its own evictions, however guesses fail."""
    fed: list[int] = []
    make = BoundCall.__init__
    with neo_runtime.load(model._bundle.path, threads=1) as small:

        def watched(call: BoundCall, backend: Any, graph: str, **arrays: Any) -> None:
            if backend is small._backend and graph == "prefill":
                fed.append(arrays["input_ids"].size)
            make(call, backend, graph, **arrays)

        monkeypatch.setattr(BoundCall, "__init__", watched)
        prompt = varied_prompts(4)[3]
        for options in ({"do_sample": True, "seed": 2}, {}):
            del fed[:]
            options |= {"ignore_eos": True, "max_new_tokens": 200}
            alone = model.generate(prompt, **options)
            found = model.generate(prompt, drafter=DraftModel(small, 8), **options)
            assert found.token_ids == alone.token_ids
            assert found.timings.accepted_draft_tokens > 40
            assert fed[0] == len(prompt) + 1
            assert max(fed[1:]) <= 3, "what is new since it was asked last, and nothing again"
        assert small.cache_bytes_in_use == 0


def test_a_draft_model_of_another_shape(model: Model, tmp_path: Path) -> None:
    """Its window is shorter, so that it evicts where the model does not, and it ends before."""
    config = TinyConfig(vocab_size=4096, window_size=8, max_position_embeddings=90)
    export_bundle(str(make_checkpoint(tmp_path / "small", config)), tmp_path / "bundle")
    prompt = varied_prompts(4)[3]
    alone = model.generate(prompt, max_new_tokens=100, ignore_eos=True)
    with neo_runtime.load(tmp_path / "bundle", threads=1) as small:
        drafter = DraftModel(small, 6, 0)
        found = model.generate(prompt, max_new_tokens=100, ignore_eos=True, drafter=drafter)
        assert found.token_ids == alone.token_ids
        assert 30 < found.timings.draft_tokens < 80, "none behind its last position"
        # Whatever it says is what it says without the guesses of before.
        ids = np.array([*prompt, *alone.token_ids])
        with drafter.begin(model, 200) as propose:
            told = [propose(ids[:n], 6).tolist() for n in range(31, 80)]
        for n, guess in zip(range(31, 80), told, strict=True):
            with drafter.begin(model, 200) as propose:
                assert propose(ids[:n], 6).tolist()[:1] == guess[:1]


def test_a_draft_model_that_does_not_fit(model: Model, tmp_path: Path) -> None:
    export_bundle(str(make_checkpoint(tmp_path / "odd", TinyConfig())), tmp_path / "bundle")
    with (
        neo_runtime.load(model._bundle.path, threads=1, max_cache_bytes=10) as small,
        pytest.raises(CacheLimitError),
    ):
        model.generate([1], drafter=DraftModel(small))
    with (
        neo_runtime.load(tmp_path / "bundle", threads=1) as other,
        pytest.raises(RequestError, match=r"draft model has \d+ tokens and the model 4096"),
    ):
        model.generate([1], drafter=DraftModel(other))
    assert model.cache_bytes_in_use == 0


def test_a_draft_model_stops_where_it_does_not_know(model: Model) -> None:
    prompt = varied_prompts(4)[3]
    drafted = {
        threshold: model.generate(
            prompt, max_new_tokens=40, drafter=DraftModel(model, 8, threshold), ignore_eos=True
        ).timings.draft_tokens
        for threshold in (0, 0.4, 0.9, 1)
    }
    assert drafted[0] > drafted[0.4] > drafted[0.9] > drafted[1] == 0


def test_errors_of_a_draft_model_say_so(model: Model) -> None:
    small = neo_runtime.load(model._bundle.path, threads=1)
    stream = model.stream("Once upon a time", drafter=DraftModel(small), max_new_tokens=60)
    next(stream)
    small.close()
    with pytest.raises(NeoError, match="the draft model: the model is closed"):
        list(stream)
    with pytest.raises(NeoError, match="the draft model: the model is closed"):
        model.generate([1], drafter=DraftModel(small))
    assert model.cache_bytes_in_use == 0


def test_threads_share_a_drafter(model: Model) -> None:
    prompts = varied_prompts(4)
    drafter = DraftModel(model)
    alone = [model.generate(prompt, max_new_tokens=20).token_ids for prompt in prompts]
    found: dict[int, tuple[int, ...]] = {}

    def work(index: int) -> None:
        one = model.generate(prompts[index], max_new_tokens=20, drafter=drafter)
        found[index] = one.token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(4)] == alone


def test_what_is_refused(model: Model) -> None:
    for wrong, message in (
        ({"drafter": "lookup"}, "drafter is 'lookup', expected an instance of"),
        ({"drafter": PromptLookup}, "expected an instance of neo_runtime.PromptLookup"),
        ({"drafter": PromptLookup(), "num_beams": 2}, "set num_beams=1"),
        (
            {"drafter": PromptLookup(), "num_return_sequences": 2, "do_sample": True},
            "num_return_sequences=1",
        ),
    ):
        with pytest.raises(RequestError, match=message):
            model.generate([1], **wrong)  # type: ignore[call-overload]
    for make, message in (
        (lambda: PromptLookup(0), "num_tokens is 0"),
        (lambda: PromptLookup(max_ngram_size=1.5), "max_ngram_size is 1.5"),  # type: ignore[arg-type]
        (lambda: PromptLookup(5, 1), "min_ngram_size is 2, expected at most max_ngram_size, 1"),
        (lambda: DraftModel("x"), "draft model is of type str"),  # type: ignore[arg-type]
        (lambda: DraftModel(model, confidence_threshold=2), "confidence_threshold is 2"),
    ):
        with pytest.raises(RequestError, match=message):
            make()
    with (
        neo_runtime.Scheduler(model, max_batch_size=1) as scheduler,
        pytest.raises(RequestError, match="only generate and stream take one"),
    ):
        scheduler.submit([1], drafter=PromptLookup())
    calls: list[int] = []
    with pytest.raises(RequestError, match="seed has 2 entries"):
        model.generate(
            [[1], [2], [3]],
            do_sample=True,
            seed=(1, 2),
            drafter=PromptLookup(),
            should_stop=lambda: bool(calls.append(1)),
        )
    assert not calls, "before any work"
    for name, hint in (
        ("assistant_model", "DraftModel"),
        ("prompt_lookup_num_tokens", "PromptLookup"),
    ):
        with pytest.raises(RequestError, match=f"it is drafter=neo_runtime.{hint}"):
            model.generate([1], **{name: 3})


class Says(Drafter):
    def __init__(self, guess: Any) -> None:
        self.guess = guess

    def begin(self, model: CachedModel, length: int) -> AbstractContextManager[Propose]:
        return nullcontext(lambda ids, most: self.guess)


@pytest.mark.parametrize("usable", [[5, 6], (5,), [], np.array([7], np.int32), np.arange(50)])
def test_any_row_of_ids_is_a_guess(model: Model, usable: Any) -> None:
    alone = model.generate("Once upon a time", max_new_tokens=9)
    found = model.generate("Once upon a time", max_new_tokens=9, drafter=Says(usable))
    assert found.token_ids == alone.token_ids


@pytest.mark.parametrize(
    "wrong", [None, 3, "abc", [0.5], [True], [[1, 2]], [[1], [2, 3]], [-1], [10**6]]
)
def test_anything_else_is_refused(model: Model, wrong: Any) -> None:
    with pytest.raises(
        RequestError, match=r"the drafter gave .*, expected token ids in a row, 0 to 4095"
    ):
        model.generate("Once upon a time", max_new_tokens=9, drafter=Says(wrong))
    assert model.cache_bytes_in_use == 0


def test_a_drafter_cannot_change_what_was_said(model: Model) -> None:
    class Vandal(Drafter):
        def begin(self, model: CachedModel, length: int) -> AbstractContextManager[Propose]:
            def propose(ids: IntArray, most: int) -> IntArray:
                ids[:] = 5
                return ids[:0]

            return nullcontext(propose)

    with pytest.raises(ValueError, match="read-only"):
        model.generate("Once upon a time", max_new_tokens=9, drafter=Vandal())


def test_the_command(mini_bundle: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [str(mini_bundle), "Tom and Sam. Tom and Sam. Tom and", "--max-new-tokens", "30"]
    assert main(arguments) == 0
    expected = capsys.readouterr().out
    for more in (["--prompt-lookup"], ["--draft-model", str(mini_bundle), "--draft-tokens", "3"]):
        assert main([*arguments, *more, "--timings"]) == 0
        found = capsys.readouterr()
        assert found.out == expected
        assert "guesses right" in found.err
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"Tom"\n"The dog"\n')
    lines = [str(mini_bundle), "--prompts-file", str(prompts), "--json-lines"]
    lines += ["--max-new-tokens", "9"]
    assert main(lines) == 0
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert main([*lines, "--prompt-lookup"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["text"] for one in objects] == texts
    assert "accepted_draft_tokens" in objects[0]["timings"]
    for wrong, message in (
        (["--draft-tokens", "3"], "needs --prompt-lookup or --draft-model"),
        (["--prompt-lookup", "--draft-tokens", "0"], "--draft-tokens is 0"),
        (["--draft-model", str(tmp_path)], "neo.json"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err
