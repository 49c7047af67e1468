"""Rules of the caller's own: in the same place among the others as in transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from helpers.hf_reference import reference_continuations, varied_prompts
from neo_runtime.errors import GenerationConfigError, RequestError
from neo_runtime.options.generation_options import GenerationOptions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from neo_runtime.model import Model
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]
    Scores = NDArray[np.float32]


@pytest.fixture(scope="module")
def model(mini_bundle: Path) -> Iterator[Model]:
    with neo_runtime.load(mini_bundle, threads=1) as loaded:
        yield loaded


def some_only(ids: Ids, scores: Scores) -> Scores:
    """Two thirds of the vocabulary, which ones depends on what was said."""
    scores[(np.arange(scores.size) + ids[-1] + len(ids)) % 3 == 0] = -np.inf
    return scores


def doubled(ids: Ids, scores: Scores) -> Scores:
    return scores * 2


def reference_rules() -> Any:
    """The same for transformers."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    class SomeOnly(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            places = torch.arange(scores.shape[1]) + input_ids[:, -1:] + input_ids.shape[1]
            return scores.masked_fill(places % 3 == 0, -torch.inf)

    class Doubled(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return scores * 2

    return LogitsProcessorList([SomeOnly(), Doubled()])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.4},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    ],
    ids=str,
)
def test_the_texts_of_transformers(model: Model, options: dict[str, Any]) -> None:
    prompts = varied_prompts(5)
    shared = {"max_new_tokens": 12, "min_new_tokens": 12, **options}
    expected = reference_continuations(
        prompts, do_sample=False, logits_processor=reference_rules(), **shared
    )
    found = model.generate(prompts, logits_processor=[some_only, doubled], **shared)
    assert [c.token_ids for c in found] == [ids for each in expected for ids in each]
    free = model.generate(prompts, **shared)
    assert [c.token_ids for c in found] != [c.token_ids for c in free]


def test_every_way_to_generate(model: Model, cuda_bundle: Path) -> None:
    """Alone, in a batch, as a stream, scheduled; with graphs that give candidates only."""

    def check(model: Model) -> None:
        options: dict[str, Any] = {"max_new_tokens": 15, "do_sample": True, "seed": 3}
        options["logits_processor"] = some_only
        texts = ["Once upon a time", "The dog", "Tom"]
        alone = [model.generate(text, **options).text for text in texts]
        assert [c.text for c in model.generate(texts, **options)] == alone
        assert "".join(model.stream(texts[0], **options)) == alone[0]
        with neo_runtime.Scheduler(model, max_batch_size=2, max_length=64) as scheduler:
            pending = [scheduler.submit(text, **options) for text in texts]
            assert [one.result(timeout=60).text for one in pending] == alone

    check(model)
    with neo_runtime.load(cuda_bundle, backend="cpu", threads=1) as other:
        check(other)


def test_each_sequence_asks_for_itself(model: Model) -> None:
    seen: list[list[int]] = []

    def watch(ids: Ids, scores: Scores) -> Scores:
        seen.append(ids.tolist())
        assert scores.dtype == np.float32
        return scores

    found = model.generate([[5, 6], [7]], max_new_tokens=2, ignore_eos=True, logits_processor=watch)
    first, second = (list(c.token_ids) for c in found)
    expected = [[5, 6], [7], [5, 6, first[0]], [7, second[0]]]
    assert sorted(seen) == sorted(expected)
    logprobs = model.generate("Tom", max_new_tokens=3, logprobs=1, logits_processor=some_only)
    plain = model.logits(logprobs.prompt_token_ids)[-1]
    [best] = (logprobs.logprobs or ())[0].top_logprobs or ()
    assert best.token == plain.argmax(), "log probabilities are the model's own"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda ids, scores: None, r"gave object of shape \[\], expected scores of shape \[4096\]"),
        (lambda ids, scores: scores[1:], r"shape \[4095\], expected .* \[4096\]"),
        (lambda ids, scores: scores > 0, "the logits_processor <lambda> gave bool"),
        (lambda ids, scores: scores * np.nan, r"gave scores with nan \(in float32\); give finite"),
        (lambda ids, scores: scores + np.inf, "gave scores with inf"),
        (lambda ids, scores: np.append(scores[1:], np.inf), "gave scores with inf"),
        (lambda ids, scores: scores.astype(np.float64) + 1e39, "gave scores with inf"),
        (lambda ids, scores: [[1.0], [1.0, 2.0]], "gave no array of scores"),
        (lambda ids, scores: scores - np.inf, "forbid every token here"),
    ],
)
def test_what_is_no_rule(model: Model, rule: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        model.generate("Tom", max_new_tokens=2, logits_processor=rule)
    with pytest.raises(RequestError, match=message):
        model.generate("Tom", max_new_tokens=2, num_beams=2, logits_processor=rule)
    assert model.cache_bytes_in_use == 0


def test_the_sequence_is_not_changed(model: Model) -> None:
    def wrong(ids: Ids, scores: Scores) -> Scores:
        ids[-1] = 0
        return scores

    with pytest.raises(ValueError, match="read-only"):
        model.generate("Tom", max_new_tokens=2, logits_processor=wrong)


def test_its_values() -> None:
    assert GenerationOptions(logits_processor=None).logits_processor == ()  # type: ignore[arg-type]
    assert GenerationOptions(logits_processor=doubled).logits_processor == (doubled,)  # type: ignore[arg-type]
    both = GenerationOptions(logits_processor=[some_only, doubled])  # type: ignore[arg-type]
    assert both.logits_processor == (some_only, doubled)
    for wrong in (3, "text", [doubled, 3], {"a": doubled}):
        with pytest.raises(RequestError, match=r"logits_processor is .*expected a function"):
            GenerationOptions(logits_processor=wrong)  # type: ignore[arg-type]
    with pytest.raises(GenerationConfigError, match="logits_processor"):
        GenerationOptions.from_generation_config({"logits_processor": ["x"]})
