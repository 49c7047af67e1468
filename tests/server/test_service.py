"""Clients that go, crowds, broken requests, and what is counted."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from contextlib import closing
from dataclasses import replace
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import openai
import pytest
from helpers import serving
from helpers.computed_prompts import computed_prompts
from helpers.derived_bundles import bundle_with
from helpers.serving import NAME, served
from neo_runtime import Scheduler
from neo_runtime.cached_model import CachedModel
from neo_runtime.errors import CacheLimitError, DeviceMemoryError, HostMemoryError, RequestError
from neo_runtime.generation.completion import Completion, Timings
from neo_runtime.scheduling.pending import PendingCompletion
from neo_runtime.text.tokenizer import Tokenizer
from neo_server import connections, scoring
from neo_server.errors import ApiError
from neo_server.limits import Limits
from neo_server.listening import bound
from neo_server.metrics import Metrics
from neo_server.scoring import PromptScorer
from neo_server.service import Service

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from helpers.serving import Served
    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.model import Model

LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}


class SlowSteps:
    """Each step of decode takes 20 ms more, waits where it is held up, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.go_on = threading.Event()
        self.go_on.set()
        self.error: Exception | None = None
        decode = CachedModel.decode_step

        def decode_step(model: CachedModel, cache: KVCache, tokens: Sequence[int]) -> Any:
            self.count += 1
            time.sleep(0.02)
            assert self.go_on.wait(60)
            if self.error is not None:
                raise self.error
            return decode(model, cache, tokens)

        monkeypatch.setattr(CachedModel, "decode_step", decode_step)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> SlowSteps:
    return SlowSteps(monkeypatch)


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"stream": True}, {"stream": True, "n": 3}])
def test_a_client_that_goes_is_computed_for_no_more(
    server: Served, steps: SlowSteps, fields: dict[str, Any]
) -> None:
    connection = server.send(LONG | fields)
    if "stream" in fields:
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        response.close()  # which holds the socket as well
    else:
        while steps.count < 3:
            time.sleep(0.01)
    connection.close()
    server.wait_until_idle()
    assert steps.count < 250


def test_a_client_that_goes_before_its_turn(server: Served, steps: SlowSteps) -> None:
    steps.go_on.clear()
    before = server.ended("cancelled")
    held = [server.send(LONG | {"n": 6, "max_tokens": 5})]
    while steps.count < 1:
        time.sleep(0.01)
    waiting = [server.send(LONG | {"stream": stream}) for stream in (False, True) * 3]
    while server.service.room.inside < 12:
        time.sleep(0.01)
    for connection in waiting:
        connection.close()
    while server.ended("cancelled") < before + 6:
        time.sleep(0.01)
    assert server.service.room.inside == 12, "the scheduler still has them"
    steps.go_on.set()
    assert held[0].getresponse().status == 200
    held[0].close()
    server.wait_until_idle()
    assert steps.count < 12


def test_a_client_that_goes_while_it_is_let_in(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = []
    submit = Scheduler.submit

    def slow(self: Scheduler, *arguments: Any, **options: Any) -> Any:
        submitted.append(arguments)
        time.sleep(0.05)
        return submit(self, *arguments, **options)

    monkeypatch.setattr(Scheduler, "submit", slow)
    connection = server.send(LONG | {"n": 100})
    while len(submitted) < 3:
        time.sleep(0.01)
    connection.close()
    server.wait_until_idle()
    time.sleep(0.2)
    assert len(submitted) < 50


def test_a_crowd_is_refused_and_may_come_again(model: Model, steps: SlowSteps) -> None:
    with served(model, max_batch_size=2, max_queue=3) as running:
        steps.go_on.clear()
        first = [running.send({"prompt": "a", "max_tokens": 3}) for _ in range(3)]
        while running.service.room.inside < 3:
            time.sleep(0.01)
        status, answer, headers = running.answer({"prompt": "a"})
        assert (status, headers["retry-after"]) == (503, "1")
        assert answer["error"]["message"] == (
            "3 of at most 3 sequences are being served, and the request asks for 1; try again"
        )
        assert answer["error"]["type"] == "server_error"
        with running.client() as client, pytest.raises(openai.InternalServerError):
            client.completions.create(model=NAME, prompt="a")
        steps.go_on.set()
        for connection in first:
            assert connection.getresponse().status == 200
            connection.close()
        running.wait_until_idle()
        assert running.answer({"prompt": "a", "max_tokens": 1})[0] == 200


BROKEN: list[tuple[bytes, int, str]] = [
    (b"{", 400, "the request's body is not JSON"),
    (b"", 400, "the request's body is not JSON"),
    (b"\xff\xfe{}", 400, "the request's body is not JSON"),
    (b"[" * 100_000, 400, "the request's body is not JSON"),
    (b"[1]", 400, "the request's body is not a JSON object"),
    (b'{"prompt": "a", "\\ud800": 1}', 400, "unknown fields in the request"),
    (b'{"prompt": "\\ud800"}', 400, "\\ud800"),
    (b'{"prompt": "a", "model": "\\ud800"}', 404, "\\ud800"),
    (b'{"prompt": "a", "model": 3}', 400, "model is 3, expected a name"),
    (b'{"prompt": "a", "temperature": NaN}', 400, "temperature is nan"),
    (b'{"prompt": "a", "max_tokens": ' + b"9" * 400 + b"}", 400, "expected at most 1000000"),
    (b'{"prompt": "a", "model": "' + b"m" * 100_000 + b'"}', 404, "the model 'mmmm"),
    (b'{"prompt": "a", "max_tokens": 1e3}', 400, "max_tokens is 1000.0, expected an integer"),
    (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400, "not JSON"),
    (b'{"prompt": "' + b"a" * 5_000_000 + b'"}', 413, "has more than 4194304 bytes"),
]


@pytest.mark.parametrize(("body", "status", "message"), BROKEN)
def test_broken_requests(server: Served, body: bytes, status: int, message: str) -> None:
    found, answer, _ = server.answer(body)
    assert found == status
    assert message in answer["error"]["message"]
    assert len(answer["error"]["message"]) <= 1000
    server.wait_until_idle()


def test_null_is_as_good_as_absent(server: Served) -> None:
    names = ("n", "best_of", "temperature", "stop", "logprobs", "seed", "suffix", "user", "echo")
    fields = dict.fromkeys((*names, "stream", "stream_options", "logit_bias", "max_tokens"))
    assert server.answer({"prompt": "a", **fields})[0] == 200


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RuntimeError("secret"), 500, "the server failed at this request; its log says why"),
        (DeviceMemoryError("secret"), 503, "there is no memory for this request now"),
        (HostMemoryError("secret"), 503, "there is no memory for this request now"),
    ],
)
def test_a_failure_is_logged_and_told(
    server: Served,
    steps: SlowSteps,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    status: int,
    message: str,
) -> None:
    steps.error = error
    found, answer, _ = server.answer({"prompt": "a", "max_tokens": 4, "ignore_eos": True})
    assert found == status
    assert answer["error"]["message"].startswith(message)
    assert "secret" in caplog.text
    with (
        server.client() as client,
        client.completions.create(
            model=NAME, prompt="a", stream=True, extra_body={"ignore_eos": True}
        ) as stream,
        pytest.raises(openai.APIError, match=message),
    ):
        list(stream)
    steps.error = None
    assert server.answer({"prompt": "a", "max_tokens": 4})[0] == 200


def test_what_is_counted(model: Model) -> None:
    with served(model, max_batch_size=2) as running:
        running.answer({"prompt": [[1, 2, 3], [4]], "max_tokens": 5, "ignore_eos": True})
        running.answer({"prompt": "a", "n": 0})
        running.answer({"prompt": [1], "max_tokens": 2, "ignore_eos": True})
        status, text = running.get("/metrics")
    values = dict(re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE))
    expected = {
        'neo_requests_total{status="200"}': 2,
        'neo_requests_total{status="400"}': 1,
        "neo_prompt_tokens_total": 5,
        "neo_generated_tokens_total": 12,
        'neo_sequences_total{finish_reason="length"}': 3,
        "neo_time_to_first_token_seconds_count": 3,
        "neo_time_per_token_seconds_count": 3,
        "neo_sequences_active": 0,
        "neo_sequences_waiting": 0,
    }
    assert status == 200
    assert {name: float(values[name]) for name in expected} == expected
    assert float(values["neo_cache_bytes"]) > 0


def test_what_prompts_begin_with_is_computed_once(model: Model) -> None:
    """And told: by prompt, as its first continuation found it."""
    first, second = list(range(100, 200)), [*range(100, 170), *range(30)]
    fields = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    with served(model, max_batch_size=2) as running:
        plain = [running.answer({"prompt": ids} | fields)[1] for ids in (first, second)]
    with served(model, max_batch_size=2, prefix_cache_bytes=10**7) as running:
        found = [running.answer({"prompt": ids} | fields)[1] for ids in (first, second)]
        both = running.answer({"prompt": [first, second], "n": 3} | fields | {"temperature": 1})[1]
        with running.client() as client:
            *_, last = client.completions.create(
                model=NAME,
                prompt=second,
                max_tokens=1,
                stream=True,
                stream_options={"include_usage": True},
            )
        text = running.get("/metrics")[1]
    assert all("prompt_tokens_details" not in answer["usage"] for answer in plain)
    texts = [[answer["choices"][0]["text"] for answer in answers] for answers in (plain, found)]
    assert texts[0] == texts[1]
    cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in (*found, both)]
    assert cached == [0, 64, 96 + 96]
    assert both["usage"]["prompt_tokens"] == 200
    assert last.usage.prompt_tokens_details.cached_tokens == 96
    # Each continuation by itself, as each is begun by itself.
    assert "neo_prefix_cache_queries_total 900.0" in text
    assert "neo_prefix_cache_hits_total 736.0" in text


@pytest.mark.parametrize("room", [0, 10**6, 30 * 10**6])
def test_several_continuations_of_a_prompt(
    mini_bundle: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompt is computed once, or nearly: also where a prefix cache has no room for it."""
    import neo_runtime

    with neo_runtime.load(mini_bundle, threads=1) as model:
        computed = computed_prompts(monkeypatch)
        with served(model, max_batch_size=8, prefix_cache_bytes=room) as running:
            body = {"prompt": list(range(5, 405)), "n": 8, "max_tokens": 3, "ignore_eos": True}
            assert running.answer(body)[0] == 200
            assert 400 <= sum(computed) <= 400 + 8 * 32
            # Those of the next request too.
            assert running.answer(body | {"prompt": list(range(905, 1305))})[0] == 200
            assert 800 <= sum(computed) <= 800 + 16 * 32


def test_times_of_a_sequence() -> None:
    timings = Timings(
        prefill_seconds=1, time_to_first_token=2, decode_seconds=6, tokens_per_second=0.5
    )
    completion = Completion(
        text="",
        token_ids=(1, 2, 3, 4),
        prompt_token_ids=(1,),
        finish_reason="stop",
        stop=None,
        timings=timings,
    )
    metrics, pending = Metrics(), PendingCompletion()
    pending.queue_seconds, pending.time_to_first_token = 0.5, 1.5
    pending.set_result(completion)
    metrics.left(pending)
    text = metrics.text().decode()
    assert "neo_queue_seconds_sum 0.5" in text
    assert "neo_time_to_first_token_seconds_sum 1.5" in text
    assert "neo_time_per_token_seconds_sum 2.0" in text
    single = PendingCompletion()
    single.set_result(replace(completion, token_ids=(1,)))
    metrics.left(single)
    text = metrics.text().decode()
    assert "neo_time_per_token_seconds_count 1.0" in text, "there is nothing between one token"
    assert 'neo_sequences_total{finish_reason="stop"} 2.0' in text
    given_up = PendingCompletion()
    given_up.queue_seconds = 3.0
    given_up.cancel()
    metrics.left(given_up)
    text = metrics.text().decode()
    assert "neo_queue_seconds_sum 3.5" in text
    assert "neo_time_to_first_token_seconds_count 1.0" in text
    assert 'neo_sequences_total{finish_reason="cancelled"} 1.0' in text


def test_a_prompt_that_is_scored_waits_for_room(mini_bundle: Path) -> None:
    import neo_runtime

    async def run(model: Model) -> None:
        with PromptScorer(model) as scorer:
            with model.new_cache(1, 16):
                scores = asyncio.create_task(scorer.scores(np.arange(5, 15), 0))
                await asyncio.sleep(0.2)
                assert not scores.done()
            assert len(await scores) == 9

    with neo_runtime.load(mini_bundle, threads=1) as probe:
        one = probe.cache_bytes(1, 16)
    with neo_runtime.load(mini_bundle, threads=1, max_cache_bytes=one) as model:
        asyncio.run(run(model))


def test_a_prompt_that_is_scored_does_not_wait_for_ever(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_PATIENCE", 0.2)
    with neo_runtime.load(mini_bundle, threads=1) as probe:
        one = probe.cache_bytes(1, 16)
    with (
        neo_runtime.load(mini_bundle, threads=1, max_cache_bytes=one) as model,
        PromptScorer(model) as scorer,
        model.new_cache(1, 16),
        pytest.raises(CacheLimitError),
    ):
        asyncio.run(asyncio.wait_for(scorer.scores(np.arange(5, 15), 0), 30))


def test_health(server: Served) -> None:
    assert server.get("/health") == (200, '{"status": "ok"}')
    scheduler, server.service._scheduler = server.service._scheduler, None
    assert server.get("/health")[0] == 503
    assert server.answer({"prompt": "a"})[0] == 503
    server.service._scheduler = scheduler


def test_room_for_scores_stays(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import neo_runtime

    with neo_runtime.load(mini_bundle, threads=1) as probe:
        one = probe.cache_bytes(1, 512)
    with neo_runtime.load(mini_bundle, threads=1, max_cache_bytes=2 * one) as model:
        with served(model) as running:
            asked = {"prompt": [[5] * 300], "echo": True, "logprobs": 0, "max_tokens": 1}
            for _ in range(2):
                assert running.answer(asked | {"n": 2})[0] == 200
        with served(model) as running, monkeypatch.context() as patch:
            # What is left is for scores: where it waits in the queue, a prefix would hold it.
            patch.setattr(model, "prefix", lambda *_: pytest.fail("shared"))
            assert running.answer(asked | {"n": 2, "echo": False, "logprobs": None})[0] == 200
        with (
            Service(model, NAME, Limits(max_batch_size=2)) as service,
            pytest.raises(CacheLimitError),
        ):
            service.start()
        assert model.cache_bytes_in_use == 0


def test_who_does_not_read_takes_no_place(model: Model) -> None:
    asked = {"prompt": [[5] * 400], "n": 5, "stream": True, "echo": True, "logprobs": 20}
    with (
        served(model, max_batch_size=5, max_queue=5, max_sequences=5) as running,
        closing(running.send(asked | {"max_tokens": 2})),
    ):
        while running.service.metrics._prompt._value.get() < 400:
            time.sleep(0.01)
        running.wait_until_idle()
        assert running.answer({"prompt": "a", "max_tokens": 1, "n": 5})[0] == 200


def test_who_does_not_read_is_dropped(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "_UNREAD_SECONDS", 0.3)

    def small(host: str, port: int) -> socket.socket:
        """The system keeps little of what nobody reads."""
        sock = bound(host, port)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return sock

    monkeypatch.setattr(serving, "bound", small)
    asked = {"prompt": [[5] * 400] * 8, "n": 5, "stream": True, "echo": True, "logprobs": 20}
    with served(model, max_batch_size=5) as running:
        with closing(HTTPConnection("127.0.0.1", running.port)) as connection:
            connection.connect()
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.request("POST", "/v1/completions", json.dumps(asked | {"max_tokens": 2}))
            end = time.monotonic() + 60
            while "stopped reading" not in caplog.text:
                assert time.monotonic() < end
                time.sleep(0.05)
        running.wait_until_idle()


def test_a_text_that_is_much_too_long_is_not_tokenized(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: pytest.fail("tokenized"))
    status, answer, _ = server.answer({"prompt": "the dog " * 100_000})
    assert status == 400
    assert "a prompt of 800000 characters" in answer["error"]["message"]
    assert answer["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"max_tokens": 0, "echo": True, "logprobs": 0}])
def test_what_is_too_long_is_refused_before_anything_is_computed(
    server: Served, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        pytest.fail("computed")

    monkeypatch.setattr(CachedModel, "prefill_step", never)
    monkeypatch.setattr(CachedModel, "logits", never)
    asked = {"prompt": [[5] * 100, [5] * (513 if "echo" in fields else 500)], "max_tokens": 100}
    for stream in (False, True):
        status, answer, _ = server.answer(asked | fields | {"stream": stream})
        assert status == 400
        assert answer["error"]["code"] == "context_length_exceeded"


def test_a_bundles_own_minimum_is_not_the_clients(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "_generation_config", {"min_new_tokens": 50})
    with served(model, max_batch_size=1) as running:
        assert running.answer({"prompt": "a", "max_tokens": 6})[0] == 200


def test_a_bundles_own_options_are_not_the_clients(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"prompt": "Once upon a time", "max_tokens": 5, "temperature": 0}
    with served(model, max_batch_size=1) as running:
        expected = running.answer(asked)[1]["choices"][0]["text"]
    first = model.tokenizer.encode(expected)[0] if model.tokenizer is not None else 0
    file = {
        "stop_strings": [expected[2:5]],
        "forced_eos_token_id": 0,
        "presence_penalty": -50.0,
        "frequency_penalty": -50.0,
        "logit_bias": {str(first): -100},
    }
    monkeypatch.setattr(model, "_generation_config", file)
    form = {"structured_outputs": {"choice": ["yes", "no"]}}
    with served(model, max_batch_size=1) as running:
        # The forced end is the file's to say: it is no field of OpenAI's.
        found = running.answer(asked | {"forced_eos_token_id": []})[1]["choices"][0]["text"]
        assert found == expected
        status, answer, _ = running.answer(asked | form)
        assert (status, answer["choices"][0]["text"] in ("yes", "no")) == (200, True)
        status, answer, _ = running.answer(asked | form | {"forced_eos_token_id": 0})
        assert status == 400
        assert "forced_eos_token_id would cut" in answer["error"]["message"]


def test_log_probabilities_are_counted_by_tokens(server: Served) -> None:
    text = "The dog was very happy. " * 80
    asked = {"prompt": [text] * 24, "echo": True, "logprobs": 10, "max_tokens": 0}
    assert server.answer(asked)[0] == 200
    tokens = len(server.service.tokenizer.encode(text))
    assert tokens * 24 * 11 < 500_000 < tokens * 100 * 11
    status, answer, _ = server.answer(asked | {"prompt": [text] * 100})
    assert status == 400
    assert answer["error"]["message"].startswith(
        f"the answer may have {100 * tokens} tokens with 11 log"
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
        ({"presence_penalty": -3e38, "frequency_penalty": -3e38}, None),
        ({"temperature": 0, "logit_bias": {"5": 3e38}, "sequence_bias": [[[5], 3e38]]}, None),
    ],
)
def test_numbers_that_are_too_large(
    server: Served, fields: dict[str, Any], param: str | None
) -> None:
    status, answer, _ = server.answer({"prompt": "Once upon a time", "max_tokens": 8} | fields)
    assert (status, answer["error"]["param"]) == (400, param)


@pytest.mark.parametrize("field", ["bad_words_ids", "prompt", "temperature", "stop", "x"])
def test_nesting_of_any_depth(server: Served, field: str) -> None:
    for depth in (3, 9, 100, *range(960, 1000, 2), 100_000):
        nested = "[" * depth + "]" * depth
        assert server.answer(f'{{"prompt": "a", "{field}": {nested}}}'.encode())[0] == 400


def test_an_application_without_its_lifespan() -> None:
    service = object.__new__(Service)
    service._scorer = None
    with pytest.raises(ApiError, match="the server must run its lifespan") as error:
        service.check_started()
    assert error.value.status == 500


def test_wrong_limits() -> None:
    counts = ("max_batch_size", "max_length", "max_queue", "max_sequences", "max_body_bytes")
    for name in (*counts, "request_seconds"):
        with pytest.raises(RequestError, match=f"{name} is 0, expected"):
            Limits(**{name: 0})
    with pytest.raises(RequestError, match="prefix_cache_bytes is -1, expected"):
        Limits(prefix_cache_bytes=-1)


def test_any_asgi_server_may_run_it(model: Model) -> None:
    """The lifespan loads and frees; a request in between."""
    import neo_server

    before = model.cache_bytes_in_use
    app = neo_server.create_app(model, name="other", limits=Limits(max_batch_size=2))
    body = json.dumps({"prompt": "a", "max_tokens": 2, "model": "other"}).encode()
    sent: list[dict[str, Any]] = []

    async def run() -> None:
        to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        from_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        life = asyncio.create_task(app({"type": "lifespan", "asgi": {}}, to_app.get, from_app.put))
        await to_app.put({"type": "lifespan.startup"})
        assert (await from_app.get())["type"] == "lifespan.startup.complete"
        assert model.cache_bytes_in_use > before
        received = iter([{"type": "http.request", "body": body}])

        async def receive() -> Any:
            try:
                return next(received)
            except StopIteration:
                await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await app(scope | {"query_string": b""}, receive, send)
        await to_app.put({"type": "lifespan.shutdown"})
        assert (await from_app.get())["type"] == "lifespan.shutdown.complete"
        await life

    asyncio.run(run())
    assert sent[0]["status"] == 200
    assert json.loads(sent[1]["body"])["model"] == "other"
    assert model.cache_bytes_in_use == before


@pytest.mark.parametrize(
    "config",
    [
        {"do_sample": True, "num_beams": 4},
        {"num_return_sequences": 3},
        {"do_sample": True, "temperature": 0.0, "top_p": 1.5},
        {"max_new_tokens": 0},
    ],
    ids=str,
)
def test_a_file_of_which_requests_read_nothing(
    config: dict[str, Any], mini_bundle: Path, tmp_path: Path
) -> None:
    """What every request replaces keeps no server from starting."""
    folder = bundle_with(config, mini_bundle, tmp_path / "bundle")
    with neo_runtime.load(folder, threads=1) as model, served(model) as running:
        for temperature in (0, 1):
            asked = {"prompt": "a", "max_tokens": 2, "temperature": temperature}
            assert running.answer(asked)[0] == 200


def test_a_file_that_every_request_would_fail_by(mini_bundle: Path, tmp_path: Path) -> None:
    folder = bundle_with({"top_h": 0.5}, mini_bundle, tmp_path / "bundle")
    with (
        neo_runtime.load(folder, threads=1) as model,
        pytest.raises(RequestError, match=r"top_h is 0\.5"),
    ):
        Service(model, "m", Limits())
