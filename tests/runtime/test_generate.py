"""`Model.generate`, `logits`, `prefill` and `decode` against transformers, on both layouts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import neo_runtime
import numpy as np
import pytest
from helpers.derived_bundles import derived_bundle, without_tokenizer
from helpers.hf_reference import (
    reference_continuations,
    reference_logits,
    relative_error,
    varied_prompts,
)
from helpers.models import DEMO
from neo_runtime.errors import ContextLengthError, NeoError, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from neo_runtime import Model

VOCABULARY = 4096
LENGTH = 512


@pytest.fixture(scope="module", params=["mini_bundle", "portable_bundle"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with neo_runtime.load(request.getfixturevalue(request.param), threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def fused(mini_bundle: Path) -> Iterator[Model]:
    with neo_runtime.load(mini_bundle, threads=1) as loaded:
        yield loaded


def test_greedy_continuations_equal_transformers(mini_bundle: Path, portable_bundle: Path) -> None:
    prompts = varied_prompts(10)
    options = {"max_new_tokens": 200, "eos_token_id": None, "do_sample": False}
    expected = [ids for [ids] in reference_continuations(prompts, **options)]
    for bundle in (mini_bundle, portable_bundle):
        with neo_runtime.load(bundle, threads=1) as model:
            options = {"max_new_tokens": 200, "ignore_eos": True}
            together = model.generate(prompts, **options)
            alone = [model.generate(prompt, **options) for prompt in prompts]
        assert [c.token_ids for c in alone] == expected
        assert [c.token_ids for c in together] == expected
        assert [c.text for c in together] == [c.text for c in alone]
        assert [c.prompt_token_ids for c in together] == [tuple(p) for p in prompts]


def test_beam_search_equals_transformers(fused: Model) -> None:
    prompts = varied_prompts()[:10]
    options = {"num_beams": 4, "max_new_tokens": 50, "num_return_sequences": 2}
    expected = reference_continuations(prompts, do_sample=False, **options)
    for prompt, hypotheses in zip(prompts, expected, strict=True):
        found = fused.generate([prompt], **options)
        assert [c.token_ids for c in found] == hypotheses
        assert found[0].score is not None
        assert found[1].score is not None
        assert found[0].score >= found[1].score
        ends = [c.token_ids[-1] == 0 for c in found]
        assert [c.finish_reason for c in found] == ["stop" if end else "length" for end in ends]


def test_beams_with_few_ways_to_begin(fused: Model) -> None:
    prompts = varied_prompts()[:4]
    allowed = {11, 300, 512}
    options = {
        "num_beams": 4,
        "num_return_sequences": 3,
        "max_new_tokens": 12,
        "begin_suppress_tokens": [token for token in range(4096) if token not in allowed],
    }
    expected = reference_continuations(prompts, do_sample=False, **options)
    for prompt, hypotheses in zip(prompts, expected, strict=True):
        found = fused.generate([prompt], **options)
        assert [c.token_ids for c in found] == hypotheses
        assert {c.token_ids[0] for c in found} <= allowed


def test_beams_of_which_none_is_a_candidate(fused: Model) -> None:
    with pytest.raises(RequestError, match="the options exclude every continuation"):
        fused.generate(
            [5, 6],
            num_beams=2,
            max_new_tokens=3,
            logits_processor=[lambda ids, scores: scores - np.float32(1e9)],
        )


def test_beam_search_on_the_appended_cache(portable_bundle: Path, fused: Model) -> None:
    prompts = varied_prompts()[:3]
    options = {"num_beams": 3, "max_new_tokens": 40}
    with neo_runtime.load(portable_bundle, threads=1) as model:
        found = model.generate(prompts, **options)
    assert [c.token_ids for c in found] == [c.token_ids for c in fused.generate(prompts, **options)]


def test_score_equals_transformers_at_every_position(model: Model) -> None:
    ids = [t for prompt in varied_prompts() for t in prompt][:LENGTH]
    assert len(ids) == LENGTH
    found = model.logits(ids)
    assert found.shape == (LENGTH, VOCABULARY)
    assert found.dtype == np.float32
    assert relative_error(found, reference_logits(ids)) < 1e-5
    assert model.logits(ids[:1]).shape == (1, VOCABULARY)
    assert model.tokenizer is not None
    text = "Tom and his dog"
    np.testing.assert_array_equal(model.logits(text), model.logits(model.tokenizer.encode(text)))


@pytest.mark.parametrize("layout", ["mini_bundle", "portable_bundle"])
def test_chunked_prefill_follow_up_turns_and_decode(
    layout: str, request: pytest.FixtureRequest
) -> None:
    """Three turns: prompts of unequal and of equal lengths, with decode steps in between."""
    first = varied_prompts()[:5]
    turns = [first, [[5], [6], [7], [8], [9]], [p[:9] for p in first], [p[:4] for p in first]]
    turns[2] = [p + p[: 3 * i] for i, p in enumerate(turns[2])]
    said: list[list[int]] = [[] for _ in first]
    expected = []
    for turn in turns:
        said = [before + new for before, new in zip(said, turn, strict=True)]
        expected.append(np.stack([reference_logits(ids)[-1] for ids in said]))
    for chunk in (512, 65, 64, 7):
        bundle = request.getfixturevalue(layout)
        with neo_runtime.load(bundle, threads=1, prefill_chunk=chunk) as model:
            cache = model.new_cache(5, max(map(len, said)))
            for index, turn in enumerate(turns):
                if index == 1:
                    found = model.decode(cache, [ids[0] for ids in turn])
                else:
                    found = model.prefill(cache, turn)
                assert relative_error(found, expected[index]) < 1e-5, (chunk, index)
            assert cache.lengths.tolist() == [len(ids) for ids in said]


def test_prompts_go_on_to_the_last_position(model: Model) -> None:
    """Short rows outlive the long ones; by default a row has 256 tokens or what is left."""
    ids = [t for prompt in varied_prompts() for t in prompt]
    prompts = [ids[: LENGTH - 1], ids[: LENGTH - 380], ids[: LENGTH - 370]]
    options = {"ignore_eos": True, "max_length": LENGTH}
    found = model.generate(prompts, **options)
    assert [len(c.token_ids) for c in found] == [1, 380, 370]
    assert {c.finish_reason for c in found} == {"length"}
    assert [c.token_ids for c in found] == [
        model.generate(prompt, **options).token_ids for prompt in prompts
    ]
    assert len(model.generate(ids[: LENGTH - 40], ignore_eos=True).token_ids) == 40
    assert len(model.generate(ids[:3], ignore_eos=True).token_ids) == 256


def test_asking_past_the_last_position_is_an_error(fused: Model) -> None:
    ids = [5] * 500
    assert len(fused.generate(ids, max_new_tokens=12, ignore_eos=True).token_ids) == 12
    with pytest.raises(ContextLengthError, match=r"500.*513.*512.*at most 12"):
        fused.generate(ids, max_new_tokens=13)
    with pytest.raises(ContextLengthError, match=r"600 tokens.*512"):
        fused.generate([5] * 600)
    with pytest.raises(ContextLengthError, match=r"513.*512"):
        fused.logits([5] * 513)
    with pytest.raises(ContextLengthError, match=r"513.*512"):
        fused.new_cache(1, 513)
    with fused.new_cache(2, 8) as cache:
        fused.prefill(cache, [[5, 6], [5] * 8])
        with pytest.raises(ContextLengthError, match="sequence 1 has 8 positions and would have 9"):
            fused.decode(cache, [1, 1])
        with pytest.raises(ContextLengthError, match="sequence 0"):
            fused.prefill(cache, [[5] * 9, [1]])


def test_requests_that_cannot_be_honoured(fused: Model) -> None:
    for prompt in ("", [], [[]], [""], [[1], []]):
        with pytest.raises(RequestError, match="empty"):
            fused.generate(prompt)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"token id 4096 at index 2 .*0 to 4095: .* 4096 tokens"):
        fused.generate([1, 2, 4096, -1])
    with pytest.raises(RequestError, match="token id -1 at index 0"):
        fused.logits([-1])
    with pytest.raises(RequestError, match="float64"):
        fused.generate([1.5, 2.0])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="max_new_token"):
        fused.generate("Hey", max_new_token=3)
    with pytest.raises(RequestError, match="bad_words"):
        fused.generate("Hey", bad_words=[" "])
    for wrong in (None, 7, 2.5, b"text", {"prompt": "text"}):
        with pytest.raises(RequestError, match=f"of type {type(wrong).__name__}, expected text"):
            fused.generate(wrong)  # type: ignore[call-overload]
    for beams in (1, 2):
        options = {"num_beams": beams, "max_new_tokens": 5}
        with pytest.raises(RequestError, match=r"^prompts\[1\]: token id 4096 at index 1"):
            fused.generate(["Tom", [3, 4096]], **options)
        with pytest.raises(ContextLengthError, match=r"^prompts\[2\]: .* 510 tokens"):
            fused.generate([[1], [2], [3] * 510], **options)
    with pytest.raises(RequestError, match="batch_size is 'all', expected an integer of at least"):
        fused.generate("Tom", batch_size="all")  # type: ignore[call-overload]
    for beams in (1, 2):
        with pytest.raises(RequestError, match="batch_size is 0"):
            fused.generate("Hey", batch_size=0, num_beams=beams)
    texts = fused.generate(np.array(["Tom", "Sue"]), max_new_tokens=2)  # type: ignore[call-overload]
    assert [c.text for c in texts] == [
        fused.generate(text, max_new_tokens=2).text for text in ("Tom", "Sue")
    ]
    for wrong in ({"max_new_tokens": 2}, 50):
        with pytest.raises(RequestError, match=r"expected GenerationOptions; give single options"):
            fused.generate("Hey", wrong)  # type: ignore[call-overload]
    for nested in ([[1, 2], [3]], [[[1, 2], [3]]]):
        with pytest.raises(RequestError, match="nested, expected a flat sequence"):
            fused.logits(nested) if len(nested) > 1 else fused.generate(nested)
    odd: list[object] = [[1], True, False, 0, 3, 1.5, {"a": 1}, b"girl", [None]]
    for words in odd:
        with pytest.raises(RequestError, match="expected strings; use bad_words_ids"):
            fused.generate("Hey", bad_words=words)  # type: ignore[call-overload]
    none: list[object] = [None, [], ()]
    for words in none:
        fused.generate("Hey", bad_words=words, max_new_tokens=1)  # type: ignore[call-overload]
    with fused.new_cache(2, 8) as cache:
        with pytest.raises(RequestError, match=r"prompts\[0\]: 'Tom' is text, expected token ids"):
            fused.prefill(cache, ["Tom", "Sue"])  # type: ignore[list-item]
        with pytest.raises(RequestError, match="prompts is None, expected token ids"):
            fused.prefill(cache, None)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="1 prompts for a cache of 2"):
            fused.prefill(cache, [[1]])
        with pytest.raises(RequestError, match="3 tokens for a cache of 2"):
            fused.decode(cache, [1, 2, 3])
        with pytest.raises(RequestError, match="token id 4096"):
            fused.decode(cache, [1, 4096])
    for option in ("threads", "max_cache_bytes", "prefill_chunk"):
        with pytest.raises(RequestError, match=f"{option} is 0, expected an integer of at least 1"):
            neo_runtime.load("anywhere", **{option: 0})  # type: ignore[arg-type]
    for option in ("verify", "keep_prepacked"):
        for wrong in ("no", 1):
            with pytest.raises(
                RequestError, match=f"{option} is {wrong!r}, expected True or False"
            ):
                neo_runtime.load("anywhere", **{option: wrong})  # type: ignore[arg-type]


def test_what_onnxruntime_raises_is_translated(
    fused: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("token_array", "prompt_ids"):
        monkeypatch.setattr(f"neo_runtime.cached_model.{name}", lambda ids, *_: np.array(ids))
    with fused.new_cache(1, 8) as cache:
        with pytest.raises(RequestError, match=r"outside the model's tables.*idx=9999"):
            fused.prefill(cache, [[9999]])
        with pytest.raises(NeoError, match=r"^onnxruntime failed: .*nvalid rank") as caught:
            fused.logits(np.ones((2, 1), np.int64))
        assert "\n" not in str(caught.value)


def test_a_closed_model_says_so(mini_bundle: Path) -> None:
    model = neo_runtime.load(mini_bundle, threads=1)
    cache = model.new_cache(1, 8)
    model.prefill(cache, [[1]])
    model.close()
    model.close()
    for call in (
        lambda: model.generate("Hey"),
        lambda: model.stream("Hey"),
        lambda: model.logits([1]),
        lambda: model.new_cache(1, 8),
        lambda: model.prefill(cache, [[1]]),
        lambda: model.decode(cache, [1]),
    ):
        with pytest.raises(NeoError, match="closed"):
            call()


def test_stop_strings_cut_the_text(fused: Model) -> None:
    whole = fused.generate("Once upon a time", max_new_tokens=60)
    assert whole.text is not None
    # From the middle of one token to the middle of another, three tokens on.
    stop = whole.text[21:33]
    found = fused.generate("Once upon a time", max_new_tokens=60, stop=["never there", stop])
    assert found.text == whole.text[: whole.text.index(stop)]
    assert (found.finish_reason, found.stop) == ("stop", stop)
    assert found.token_ids == whole.token_ids[: len(found.token_ids)]
    assert len(found.token_ids) < 60
    assert (whole.finish_reason, whole.stop) == ("length", None)


def test_stop_strings_end_beams_as_in_transformers(fused: Model) -> None:
    from transformers import AutoTokenizer

    assert fused.tokenizer is not None
    prompt = fused.tokenizer.encode("Once upon a time")
    options = {"max_new_tokens": 30, "num_beams": 3, "num_return_sequences": 3}
    best = fused.generate(prompt, **options)[0]  # type: ignore[index]
    stop = best.text[21:33]
    found = fused.generate([prompt], **options, stop=stop)
    expected = reference_continuations(
        [prompt],
        **options,
        do_sample=False,
        stop_strings=[stop],
        tokenizer=AutoTokenizer.from_pretrained(DEMO),
    )
    assert [[c.token_ids for c in found]] == expected
    assert {c.stop for c in found} == {stop, None}
    for completion in found:
        assert completion.text is not None
        assert stop not in completion.text
        assert (completion.finish_reason == "length") == (len(completion.token_ids) == 30)


def test_end_of_sequence_ends_a_row_alone(fused: Model) -> None:
    prompts = varied_prompts()[:6]
    free = fused.generate(prompts, max_new_tokens=60, ignore_eos=True)
    eos = free[2].token_ids[len(free[2].token_ids) // 2]
    ended = fused.generate(prompts, max_new_tokens=60, eos_token_id=eos)
    for before, after in zip(free, ended, strict=True):
        has_eos = eos in before.token_ids
        end = before.token_ids.index(eos) + 1 if has_eos else len(before.token_ids)
        assert after.token_ids == before.token_ids[:end]
        assert after.finish_reason == ("stop" if has_eos else before.finish_reason)
    assert len({len(c.token_ids) for c in ended}) > 1


def test_a_sampled_row_does_not_depend_on_its_neighbours(model: Model) -> None:
    prompts = varied_prompts()[:6]
    options = {"do_sample": True, "seed": 11, "top_k": 0, "max_new_tokens": 50, "logprobs": 0}
    together = model.generate(prompts, **options)
    turned = model.generate(prompts[::-1], **options)[::-1]
    in_twos = model.generate(prompts, batch_size=2, **options)
    alone = [model.generate(prompt, **options) for prompt in prompts]
    for batch in (together, turned, in_twos):
        assert [c.token_ids for c in batch] == [c.token_ids for c in alone]
    other = model.generate(prompts, **options | {"seed": 12})
    assert [c.token_ids for c in other] != [c.token_ids for c in alone]


def test_several_continuations_come_prompt_by_prompt(model: Model) -> None:
    prompts = varied_prompts()[:3]
    options = {"do_sample": True, "seed": 3, "max_new_tokens": 20, "num_return_sequences": 4}
    found = model.generate(prompts, **options)
    assert [c.prompt_token_ids for c in found] == [tuple(p) for p in prompts for _ in range(4)]
    assert len({c.token_ids for c in found}) == 12
    single = model.generate(prompts[1], **options)
    assert isinstance(single, list)
    assert [c.token_ids for c in single] == [c.token_ids for c in found[4:8]]


def test_what_comes_back_has_the_form_of_what_was_given(fused: Model) -> None:
    options = {"max_new_tokens": 3}
    text = "Tom had a"
    assert fused.tokenizer is not None
    ids = fused.tokenizer.encode(text)
    expected = fused.generate(text, **options).token_ids
    for prompt in (ids, tuple(ids), np.array(ids), np.array(ids, np.int32)):
        assert fused.generate(prompt, **options).token_ids == expected  # type: ignore[arg-type]
    for prompts in ([text], [ids], (text,), np.array([ids])):
        [one] = fused.generate(prompts, **options)  # type: ignore[arg-type]
        assert one.token_ids == expected
    assert [c.token_ids for c in fused.generate([text, ids], **options)] == [expected] * 2


def test_logprobs_are_those_of_the_model(fused: Model) -> None:
    prompt = varied_prompts()[1]
    found = fused.generate(prompt, max_new_tokens=5, logprobs=2)
    assert found.logprobs is not None
    logits = reference_logits([*prompt, *found.token_ids])[len(prompt) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for token, choice, row in zip(found.token_ids, found.logprobs, expected, strict=True):
        assert choice.token == token
        assert choice.logprob == pytest.approx(row[token], abs=1e-4)
        assert choice.top_logprobs is not None
        assert [t for t, _ in choice.top_logprobs] == np.argsort(-row)[:2].tolist()
    assert fused.generate(prompt, max_new_tokens=1).logprobs is None


def test_bad_words_do_not_appear(fused: Model) -> None:
    free = fused.generate("Once upon a time", max_new_tokens=30)
    assert free.text is not None
    assert " girl" in free.text
    found = fused.generate("Once upon a time", max_new_tokens=30, bad_words=["girl"])
    assert found.text is not None
    assert "girl" not in found.text
    assert found.text.startswith(free.text[: free.text.index(" girl")])


def test_the_defaults_of_the_bundle_hold(mini_bundle: Path, tmp_path: Path) -> None:
    config = {"max_new_tokens": 7, "eos_token_id": 4000, "no_repeat_ngram_size": 2}
    other = derived_bundle(
        mini_bundle, tmp_path / "other", {"generation_config.json": json.dumps(config)}
    )
    prompt = varied_prompts()[0]
    with neo_runtime.load(other, threads=1) as model:
        expected = reference_continuations([prompt], do_sample=False, **config)
        assert [[model.generate(prompt).token_ids]] == expected
        assert len(model.generate(prompt, max_new_tokens=9).token_ids) == 9
    config = {"penalty_alpha": 0.6}
    other = derived_bundle(
        mini_bundle, tmp_path / "third", {"generation_config.json": json.dumps(config)}
    )
    with neo_runtime.load(other, threads=1) as model:
        assert len(model.logits(prompt)) == len(prompt)
        with pytest.raises(RequestError, match="penalty_alpha"):
            model.generate(prompt)


def test_a_bundle_without_tokenizer_takes_and_gives_ids(
    mini_bundle: Path, tmp_path: Path, fused: Model
) -> None:
    prompt = varied_prompts()[0]
    with neo_runtime.load(without_tokenizer(mini_bundle, tmp_path / "ids"), threads=1) as model:
        assert model.tokenizer is None
        found = model.generate(prompt, max_new_tokens=10)
        assert found.text is None
        assert found.token_ids == fused.generate(prompt, max_new_tokens=10).token_ids
        for call in (
            lambda: model.generate("Once"),
            lambda: model.stream(prompt),
            lambda: model.generate(prompt, stop="a"),
            lambda: model.generate(prompt, bad_words=["a"]),
        ):
            with pytest.raises(RequestError, match="no tokenizer"):
                call()


def test_timings_agree_with_each_other(fused: Model) -> None:
    found = fused.generate("Once upon a time", max_new_tokens=20, ignore_eos=True)
    times = found.timings
    assert 0 < times.prefill_seconds <= times.time_to_first_token
    assert times.tokens_per_second == pytest.approx(19 / times.decode_seconds)
