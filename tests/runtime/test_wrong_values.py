"""Values of a wrong kind, and numbers that are too much, are told by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from neo_runtime.model import Model


@pytest.fixture(scope="module")
def model(mini_bundle: Path) -> Iterator[Model]:
    with neo_runtime.load(mini_bundle, threads=1) as loaded:
        yield loaded


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": -3e38, "frequency_penalty": -3e38},
        {"presence_penalty": -3e38, "frequency_penalty": -3e38, "num_beams": 2},
        {"logit_bias": {5: 3e38}, "sequence_bias": [[[5], 3e38]]},
        {"logit_bias": {5: 3e38}, "sequence_bias": [[[5], 3e38]], "num_beams": 2},
        {"repetition_penalty": 1.2e-38},
    ],
)
def test_scores_beyond_float32_are_the_options(model: Model, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="the options take scores beyond float32"):
        model.generate("Once upon a time", max_new_tokens=8, **options)


@pytest.mark.parametrize("wrong", [None, 5])
def test_should_stop_is_a_function(model: Model, wrong: Any) -> None:
    for call in (model.generate, model.stream):
        with pytest.raises(RequestError, match=f"should_stop is {wrong}, expected a function"):
            call("a", max_new_tokens=3, should_stop=wrong)


@pytest.mark.parametrize("wrong", [np.array(5), frozenset([1]), 5, b"a"])
def test_a_prompt_is_text_or_ids(model: Model, wrong: Any) -> None:
    with pytest.raises(RequestError, match="the prompt is of type"):
        model.generate(wrong)


@pytest.mark.parametrize("wrong", [3, np.array(3)])
def test_prompts_are_one_for_each_sequence(model: Model, wrong: Any) -> None:
    with (
        model.new_cache(1, 8) as cache,
        pytest.raises(RequestError, match="expected token ids for each sequence"),
    ):
        model.prefill(cache, wrong)


@pytest.mark.parametrize("wrong", [-1, 2**40])
def test_ids_that_are_none(model: Model, wrong: int) -> None:
    assert model.tokenizer is not None
    with pytest.raises(RequestError, match="is not a token id"):
        model.tokenizer.decode([wrong])


def test_a_session_config_is_a_mapping(mini_bundle: Path) -> None:
    with pytest.raises(RequestError, match="session_config is 5, expected a mapping"):
        neo_runtime.load(mini_bundle, session_config=5)  # type: ignore[arg-type]


def test_one_prompt_that_is_empty(model: Model) -> None:
    with pytest.raises(RequestError, match="stream got an empty prompt"):
        model.stream([])
    with neo_runtime.Scheduler(model) as scheduler, pytest.raises(RequestError, match="an empty"):
        scheduler.submit([])


def test_rows_of_a_cache_that_has_none_left(model: Model) -> None:
    with model.new_cache(1, 8) as cache:
        cache.reorder([])
        with pytest.raises(RequestError, match="expected none, as the cache has no rows"):
            cache.reorder([0])
