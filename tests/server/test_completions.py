"""What OpenAI's client gets from `neo-serve`: PyTorch's texts and probabilities, in its forms."""

from __future__ import annotations

import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
from helpers.hf_reference import (
    heldout_texts,
    reference_continuations,
    reference_logits,
    varied_prompts,
)
from helpers.serving import NAME, served
from neo_server.asked import read_request
from neo_server.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from helpers.serving import Served
    from neo_runtime.model import Model


def create(client: Any, prompt: Any, **options: Any) -> Any:
    extra = {name: options.pop(name) for name in EXTENSIONS & options.keys()}
    return client.completions.create(model=NAME, prompt=prompt, extra_body=extra, **options)


EXTENSIONS = {"top_k", "ignore_eos", "repetition_penalty", "min_tokens", "bad_words"} | {
    "return_tokens_as_token_ids",
    "stop_token_ids",
    "eos_token_id",
}


def test_greedy_texts_are_pytorchs(client: Any, model: Model) -> None:
    prompts = varied_prompts()[:5]  # of five lengths
    expected = [found for [found] in reference_continuations(prompts, max_new_tokens=20)]
    answer = create(client, prompts, temperature=0, max_tokens=20)
    assert [choice.index for choice in answer.choices] == list(range(5))
    texts = [model.tokenizer.decode(ids) for ids in expected]
    assert [choice.text for choice in answer.choices] == texts
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    assert answer.usage.completion_tokens == sum(map(len, expected))


def test_text_and_ids_are_one_prompt(client: Any, model: Model) -> None:
    text = heldout_texts()[0][:60]
    ids = model.tokenizer.encode(text)
    texts = {create(client, form, temperature=0).choices[0].text for form in (text, [text], ids)}
    assert len(texts) == 1
    assert create(client, ids, temperature=0, echo=True).choices[0].text.startswith(text)


def test_draws_are_those_of_generate(client: Any, model: Model) -> None:
    prompts = ["Once upon a time", heldout_texts()[1][:500]]  # the second one is shared
    found = create(client, prompts, n=3, seed=5, max_tokens=12).choices
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 3, "seed": 5}
    expected = model.generate(prompts, max_new_tokens=12, **options)
    assert [choice.text for choice in found] == [completion.text for completion in expected]
    assert len({choice.text for choice in found}) == 6


def test_shared_prompts_are_freed(client: Any, server: Served, model: Model) -> None:
    before = model.cache_bytes_in_use
    create(client, heldout_texts()[2][:700], n=4, max_tokens=2)
    assert model.cache_bytes_in_use == before


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_p": 0.8, "seed": 3},
    {"temperature": 0, "top_p": 0.5, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"temperature": 0, "logit_bias": {"11": -100, "13": -100}},
    {"temperature": 1.2, "seed": -1, "top_k": 5, "repetition_penalty": 1.3},
    {"temperature": 1.5, "seed": 2, "top_k": -1},
    {"temperature": 0, "stop": [".", "a little"]},
    {"temperature": 0, "min_tokens": 10, "bad_words": ["little", "Lily"]},
    {"temperature": 0, "max_tokens": 100, "ignore_eos": True},
]


def in_our_words(options: dict[str, Any]) -> dict[str, Any]:
    ours = {"max_new_tokens": 16} | options
    renamed = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
    ours = {renamed.get(name, name): value for name, value in ours.items()}
    ours["do_sample"] = ours["temperature"] > 0
    if not ours["do_sample"]:
        ours = {name: ours[name] for name in ours if name not in ("temperature", "top_p")}
    if ours.get("top_k") == -1:
        ours["top_k"] = 0
    if ours.get("seed", 0) < 0:
        ours["seed"] += 2**64
    return {"top_k": 0, **ours} if ours["do_sample"] else ours


@pytest.mark.parametrize("options", OPTIONS)
def test_options_are_those_of_generate(client: Any, model: Model, options: dict[str, Any]) -> None:
    prompt = "Once upon a time, there was"
    expected = model.generate(prompt, **in_our_words(options))
    [choice] = create(client, prompt, **options).choices
    assert choice.text == expected.text
    assert choice.finish_reason == expected.finish_reason
    [*events] = create(client, prompt, stream=True, **options)
    assert "".join(event.choices[0].text for event in events) == expected.text
    assert [event.choices[0].finish_reason for event in events] == [
        *[None] * (len(events) - 1),
        expected.finish_reason,
    ]


def test_tokens_that_stop(client: Any, server: Served, model: Model) -> None:
    """vLLM's: beside the end of sequence, which may be left out alone."""
    plain = model.generate("Once upon a time", max_new_tokens=16)
    stop = plain.token_ids[7]
    most = plain.token_ids.index(stop) + 1
    for more in ({}, {"ignore_eos": True}, {"eos_token_id": [3]}):
        given = {"temperature": 0, "stop_token_ids": [5, stop], **more}
        answer = create(client, "Once upon a time", **given)
        assert answer.usage.completion_tokens == most
        assert answer.choices[0].finish_reason == "stop"
    [eos] = model.manifest.model.eos_token_id
    bias = {"temperature": 0, "logit_bias": {str(eos): 99}, "stop_token_ids": [stop]}
    assert create(client, "Once", **bias).usage.completion_tokens == 1
    for wrong in ("a", [-1], [True], [[1]], [1] * 5000):
        status, answer, _ = server.answer({"prompt": "a", "stop_token_ids": wrong})
        assert (status, answer["error"]["param"]) == (400, "stop_token_ids")


def test_what_is_done_anyhow_may_be_asked_for(server: Served) -> None:
    neutral = {"skip_special_tokens": True, "use_beam_search": False}
    neutral |= {"include_stop_str_in_output": False, "spaces_between_special_tokens": True}
    status, _, _ = server.answer({"prompt": "a", "max_tokens": 1, **neutral})
    assert status == 200
    for name, value in neutral.items():
        status, answer, _ = server.answer({"prompt": "a", name: not value})
        assert (status, answer["error"]["param"]) == (400, name)
        assert f"must be {str(value).lower()} on this server" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({"temperature": 1e-40}, "temperature", "set temperature to 0"),
        ({"bad_words": [" "]}, "bad_words", "an empty word"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "structured_outputs.choice"),
    ],
    ids=str,
)
def test_errors_name_what_requests_have(
    server: Served, asked: dict[str, Any], param: str, words: str
) -> None:
    status, answer, _ = server.answer({"prompt": "a", **asked})
    assert (status, answer["error"]["param"]) == (400, param)
    assert words in answer["error"]["message"]


def test_log_probabilities_are_pytorchs(client: Any, model: Model) -> None:
    """Across the window and in several chunks; those of the prompt, and of new tokens."""
    ids = varied_prompts()[4]
    answer = create(client, ids, temperature=0, max_tokens=9, logprobs=3, echo=True)
    [choice] = answer.choices
    found = choice.logprobs
    new = model.generate(ids, max_new_tokens=9).token_ids
    logits = reference_logits([*ids, *new]).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    whole = [*ids, *new]
    expected = [logprobs[place - 1, whole[place]] for place in range(1, len(whole))]
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    assert found.tokens == [model.tokenizer.token(i) for i in whole]
    assert found.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    for place, top in enumerate(found.top_logprobs[1:]):
        best = np.argsort(-logprobs[place], kind="stable")[:3]
        assert {*map(model.tokenizer.token, map(int, best)), found.tokens[place + 1]} == {*top}
    for offset, token in zip(found.text_offset, found.tokens, strict=True):
        assert choice.text[offset:].startswith(token)


def test_a_stream_says_what_the_whole_answer_says(client: Any) -> None:
    options: dict[str, Any] = {"n": 2, "logprobs": 1, "echo": True, "seed": 2, "max_tokens": 30}
    prompts = ["Once upon a time", "é, 他说 and"]
    whole = create(client, prompts, **options)
    parts: dict[int, list[Any]] = {}
    *events, last = create(
        client, prompts, stream=True, stream_options={"include_usage": True}, **options
    )
    for event in events:
        assert event.usage is None
        [choice] = event.choices
        parts.setdefault(choice.index, []).append(choice)
    assert last.choices == []
    assert last.usage == whole.usage
    for choice in whole.choices:
        found = parts[choice.index]
        assert "".join(part.text for part in found) == choice.text
        assert found[-1].finish_reason == choice.finish_reason
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [entry for part in found for entry in getattr(part.logprobs, name)]
            expected = getattr(choice.logprobs, name)
            if name.endswith("logprobs"):  # the last digits depend on who else is in the batch
                assert len(joined) == len(expected)
                for one, other in zip(joined, expected, strict=True):
                    assert one == pytest.approx(other, abs=1e-4), name
            else:
                assert joined == expected, name


def test_parts_of_characters_have_names_of_their_own(client: Any, model: Model) -> None:
    ids = model.tokenizer.encode("他")
    assert len(ids) > 1
    [choice] = create(
        client, ids, echo=True, logprobs=1, max_tokens=0, return_tokens_as_token_ids=True
    ).choices
    assert choice.logprobs.tokens == [f"token_id:{i}" for i in ids]
    assert all(name.startswith("token_id:") for name in choice.logprobs.top_logprobs[1])
    assert (choice.text, choice.finish_reason) == ("他", "length")


def test_the_best_are_chosen(client: Any, model: Model) -> None:
    options: dict[str, Any] = {"seed": 1, "max_tokens": 10}
    every = create(client, "The", n=6, logprobs=0, **options).choices
    means = {c.text: np.mean(c.logprobs.token_logprobs) for c in every}
    best = sorted(means, key=lambda text: -means[text])
    found = create(client, "The", n=2, best_of=6, **options)
    assert [choice.text for choice in found.choices] == best[:2]
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.choices[0].logprobs is None
    assert found.usage.completion_tokens == 60


def test_the_best_are_chosen_by_token(client: Any) -> None:
    """Short texts are no better for being short."""
    options: dict[str, Any] = {"seed": 1, "max_tokens": 20, "stop": [" the", " a"]}
    every = create(client, "The", n=12, logprobs=0, **options).choices
    scores = {c.text: c.logprobs.token_logprobs for c in every}
    [best] = create(client, "The", n=1, best_of=12, **options).choices
    assert best.text == max(scores, key=lambda text: np.mean(scores[text]))
    assert best.text != max(scores, key=lambda text: np.sum(scores[text]))


def test_clients_at_once_get_what_each_gets_alone(client: Any) -> None:
    prompts = [text[: 20 + 9 * i] for i, text in enumerate(heldout_texts()[:12])]
    alone = [create(client, prompt, seed=i).choices[0].text for i, prompt in enumerate(prompts)]
    with ThreadPoolExecutor(12) as pool:
        together = pool.map(lambda i: create(client, prompts[i], seed=i).choices[0].text, range(12))
        assert list(together) == alone


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).max_model_len == 512
    with pytest.raises(openai.NotFoundError, match="'gpt-4'"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not here; this server has 'mini'"):
        client.completions.create(model="gpt-4", prompt="a")


def test_what_is_not_served(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="POST /v1/completions"):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "hi"}])


def test_other_methods_and_paths(server: Served) -> None:
    status, _, headers = server.answer({}, "/health")
    assert (status, {*headers["allow"].split(", ")}) == (405, {"GET", "HEAD"})
    for path in ("/health/", "/v1/models/", "/v1/completions/", "/"):
        assert server.get(path)[0] == 404, "no redirection"
    for path in ("/v1/models/other", "/v1/completions/"):
        assert "error" in server.answer({"prompt": "a"}, path)[1]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 600}, "max_tokens=600 after a prompt of 1 tokens needs 601 positions"),
    ({"temperature": -1}, "temperature is -1, expected a number of at least 0"),
    ({"top_p": 3}, "top_p is 3, expected"),
    ({"n": 0}, "n is 0, expected an integer of at least 1"),
    ({"n": 3, "best_of": 2}, "best_of is 2, expected an integer of at least 3"),
    ({"n": 129}, "n is 129, expected at most 128"),
    ({"logprobs": 21}, "logprobs is 21, expected at most 20"),
    ({"stop": ""}, "stop is '', expected"),
    ({"logit_bias": {"999999": 1}}, "logit_bias names token 999999"),
    ({"stream": True, "best_of": 2}, "best_of cannot be used with stream"),
    ({"stop": ["a"] * 17}, "stop has 17 strings, expected at most 16"),
    ({"stop": "a" * 1001}, "stop has more than 1000 characters"),
    ({"logit_bias": {str(i): 1 for i in range(4097)}}, "logit_bias has more than 4096 entries"),
    ({"extra_body": {"bad_words_ids": [[1, 2]] * 2049}}, "bad_words_ids has more than 4096"),
    ({"extra_body": {"eos_token_id": [1] * 4097}}, "eos_token_id has more than 4096 entries"),
    ({"extra_body": {"bad_words": ["a" * 500_000]}}, "bad_words has more than 4096 entries"),
    ({"prompt": [[5] * 400] * 9, "n": 20, "echo": True, "logprobs": 20}, "ask for fewer prompts"),
    ({"suffix": "end"}, "cannot insert text before a suffix"),
    ({"extra_body": {"num_beams": 2}}, "unknown fields in the request: num_beams"),
    ({"extra_body": {"seed": "x"}}, "seed is 'x', expected an integer"),
    ({"extra_body": {"echo": "yes"}}, "echo is 'yes', expected true or false"),
    ({"extra_body": {"min_tokens": 9, "max_tokens": 2}}, "min_tokens is 9 and max_tokens is 2"),
    ({"extra_body": {"stream_options": {"x": 1}}}, "stream_options is"),
    ({"prompt": ""}, "empty"),
    ({"prompt": []}, "prompt is missing, empty, or of the wrong type"),
    ({"prompt": [1, "a"]}, "prompt is missing, empty, or of the wrong type"),
    ({"prompt": [True]}, "prompt is missing, empty, or of the wrong type"),
    ({"prompt": [10**6]}, "1000000"),
    ({"prompt": ["a"] * 300}, "asks for 300 sequences, and at most 128 are taken of one"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_bad_requests(client: Any, server: Served, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=NAME, **{"prompt": "a"} | fields)
    assert message in error.value.body["message"]
    assert error.value.body["type"] == "invalid_request_error"
    server.wait_until_idle()


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


MOST: list[tuple[str, int, Callable[[int], dict[str, Any]]]] = [
    ("n", 128, lambda count: {"n": count}),
    ("best_of", 128, lambda count: {"best_of": count}),
    ("max_tokens", 10**6, lambda count: {"max_tokens": count}),
    ("min_tokens", 10**6, lambda count: {"min_tokens": count}),
    ("truncate_prompt_tokens", 10**6, lambda count: {"truncate_prompt_tokens": count}),
    ("logprobs", 20, lambda count: {"logprobs": count}),
    ("logprobs", 25_000, lambda count: ALTERNATIVES | {"prompt": [5] * count}),
    ("logprobs", 25, lambda count: ALTERNATIVES | {"n": count, "max_tokens": 999}),
    ("logprobs", 25, lambda count: ALTERNATIVES | {"prompt": ["a"] * count, "max_tokens": 999}),
    ("stop", 16, lambda count: {"stop": ["a"] * count}),
    ("stop", 1000, lambda count: {"stop": ["a", "b" * count]}),
    ("stop_token_ids", 4096, lambda count: {"stop_token_ids": [0] * count}),
    ("suppress_tokens", 4096, lambda count: {"suppress_tokens": [5] * count}),
    ("bad_words_ids", 2048, lambda count: {"bad_words_ids": [[1, 2]] * count}),
    ("bad_words", 409_599, lambda count: {"bad_words": ["a" * count]}),
    ("logit_bias", 4096, lambda count: {"logit_bias": {str(i): 1 for i in range(count)}}),
    ("suppress_tokens", 8, lambda depth: {"suppress_tokens": nested(depth)}),
]
ALTERNATIVES: dict[str, Any] = {"echo": True, "logprobs": 19, "max_tokens": 0}
"""Of which an answer may have 500,000: 25,000 tokens' with the token itself."""


@pytest.mark.parametrize(("param", "most", "fields"), MOST)
def test_the_most_that_is_taken(
    param: str, most: int, fields: Callable[[int], dict[str, Any]]
) -> None:
    assert read_request({"prompt": "a"} | fields(most))
    with pytest.raises(ApiError) as error:
        read_request({"prompt": "a"} | fields(most + 1))
    assert (error.value.status, error.value.param) == (400, param)


@pytest.mark.parametrize(
    ("name", "least"),
    [("n", 1), ("max_tokens", 0), ("min_tokens", 0), ("logprobs", 0), ("seed", -(2**63))],
)
def test_the_least_that_is_taken(name: str, least: int) -> None:
    assert read_request({"prompt": "a", name: least})
    with pytest.raises(ApiError, match=f"expected an integer of at least {least}") as error:
        read_request({"prompt": "a", name: least - 1})
    assert error.value.param == name


def test_errors_name_the_field(client: Any) -> None:
    for fields in ({"top_p": 3}, {"stop": ""}, {"logit_bias": {"999999": 1}}, {"temperature": -1}):
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(model=NAME, prompt="a", **fields)
        assert error.value.param == next(iter(fields))
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=NAME, prompt="a", max_tokens=600)
    assert error.value.param == "max_tokens"


def test_offsets_are_those_of_the_text(client: Any, model: Model) -> None:
    """With special tokens in the prompt, and where it ends within a character."""
    [special] = model.manifest.model.eos_token_id
    cut = [*model.tokenizer.encode("The"), *model.tokenizer.encode("他")[:1]]
    for prompt in ("<|endoftext|>The dog", [special, *model.tokenizer.encode("The dog")], cut):
        [choice] = create(client, prompt, echo=True, logprobs=0, max_tokens=3, seed=1).choices
        found = choice.logprobs
        for offset, token in zip(found.text_offset, found.tokens, strict=True):
            assert choice.text[offset:].startswith(token)


def test_of_tokens_with_one_text_the_best_is_shown(client: Any, model: Model) -> None:
    """A client that looks for the largest value must not take the token for it."""
    ids = model.tokenizer.encode("他说他说é他")
    [choice] = create(client, ids, echo=True, logprobs=20, max_tokens=0).choices
    whole = model.token_logprobs(ids, top_logprobs=20)
    for found, expected in zip(choice.logprobs.top_logprobs[1:], whole, strict=True):
        best = expected.top_logprobs[0]
        assert max(found.values()) == best.logprob
        assert found[model.tokenizer.token(best.token)] == best.logprob


def test_too_long_a_prompt_has_openais_code(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        create(client, "a " * 2000)
    assert error.value.code == "context_length_exceeded"


def test_keys(model: Model) -> None:
    with served(model, keys=("one", "two", "ключ"), max_batch_size=1) as running:
        request = urllib.request.Request(f"{running.url}/v1/models")
        request.add_header("Authorization", "Bearer ключ".encode().decode("latin-1"))
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
        for key in ("one", "two"):
            with running.client(key) as client:
                assert create(client, "a", max_tokens=1).choices
        for key in ("three", "on", "onee"):
            with running.client(key) as client:
                with pytest.raises(openai.AuthenticationError, match="missing or unknown"):
                    create(client, "a")
                with pytest.raises(openai.AuthenticationError) as refused:
                    client.models.list()
                assert refused.value.response.headers["www-authenticate"] == "Bearer"
