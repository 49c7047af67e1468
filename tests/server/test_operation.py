"""What an operator relies on: ids and lines of requests, limits of time and size, honest counts."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import threading
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import openai
import pytest
from helpers import serving
from helpers.serving import NAME, served
from neo_runtime import Scheduler
from neo_runtime.cached_model import CachedModel
from neo_server import bodies, connections
from neo_server.asked import read_request
from neo_server.errors import ApiError
from neo_server.follow import Followed
from neo_server.limits import Limits
from neo_server.listening import bound
from neo_server.log_lines import JsonLines, Rarely
from neo_server.scoring import PromptScorer
from neo_server.service import Service
from starlette.requests import Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from helpers.serving import Served
    from neo_runtime.model import Model

LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of decode takes 20 ms more."""
    decode = CachedModel.decode_step

    def decode_step(model: CachedModel, *arguments: Any) -> Any:
        time.sleep(0.02)
        return decode(model, *arguments)

    monkeypatch.setattr(CachedModel, "decode_step", decode_step)


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def metric(server: Served, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", server.get("/metrics")[1], re.MULTILINE)
    return float(found[1]) if found else 0.0


def raw(server: Served, text: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(text.encode())
    return connection


def head(length: int, *lines: str) -> str:
    said = ["POST /v1/completions HTTP/1.1", "Host: a", f"Content-Length: {length}", *lines]
    return "\r\n".join([*said, "", ""])


def test_a_request_is_found_by_its_id(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "neo_server.access")
    asked = {"model": NAME, "prompt": "a b", "max_tokens": 3, "extra_body": {"ignore_eos": True}}
    with server.client() as client:
        ours = client.completions.create(**asked)
        theirs = client.completions.create(**asked, extra_headers={"X-Request-Id": "job:7/a"})
        odd = client.completions.create(**asked, extra_headers={"X-Request-Id": 'a" 200'})
        events = list(client.completions.create(**asked, stream=True))
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model=NAME, prompt="", temperature=-1)
    assert ours.id == f"cmpl-{ours._request_id}"
    assert (theirs.id, theirs._request_id) == ("cmpl-job:7/a", "job:7/a")
    assert re.fullmatch("[0-9a-f]{32}", odd._request_id)
    until(lambda: len(caplog.records) == 5)
    lines = [record.getMessage() for record in caplog.records]
    tokens = ours.usage.prompt_tokens
    assert re.fullmatch(
        rf'127\.0\.0\.1:\d+ "POST /v1/completions" 200 \d+\.\d{{3}} s, {tokens} \+ 3 tokens, '
        f"id {ours._request_id}",
        lines[0],
    )
    assert lines[1].endswith(f"{tokens} + 3 tokens, id job:7/a")
    assert lines[3].endswith(f"{tokens} + 3 tokens, id {events[0].id.removeprefix('cmpl-')}")
    assert " 400 " in lines[4]
    assert lines[4].endswith(f"id {refused.value.request_id}")


def test_lines_tell_no_secrets_and_no_probes(
    server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neo_server.access")
    for path in ("/health", "/livez", "/metrics", "/version"):
        assert server.get(path)[0] == 200
    assert server.get("/v1/models?api_key=secret%0A")[0] == 200
    assert server.get("/%0Ano")[0] == 404
    until(lambda: len(caplog.records) == 3)
    lines = [record.getMessage() for record in caplog.records]
    assert [re.findall('"(.*)"', line)[0] for line in lines] == [
        "GET /version",
        "GET /v1/models",
        "GET /%0Ano",
    ]


def test_lines_tell_of_probes_that_fail(
    server: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "neo_server.access")
    with monkeypatch.context() as patch:
        patch.setattr(server.service, "is_leaving", True)
        assert server.get("/health")[0] == 503
        assert server.get("/livez")[0] == 200
        patch.setattr(server.service.metrics, "text", lambda: 1 / 0)
        assert server.get("/metrics")[0] == 500
    until(lambda: len(access_lines(caplog)) == 2)
    lines = access_lines(caplog)
    assert '"GET /health" 503 ' in lines[0]
    assert '"GET /metrics" 500 ' in lines[1]


def access_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    named = [record for record in caplog.records if record.name == "neo_server.access"]
    return [record.getMessage() for record in named]


def test_the_line_of_what_was_refused_counts_no_tokens(
    server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neo_server.access")
    assert server.answer({"prompt": "a b c", "max_tokens": 600})[0] == 400
    until(lambda: len(access_lines(caplog)) == 1)
    assert ", 0 + 0 tokens, id " in access_lines(caplog)[0]


def test_time_runs_from_the_arrival(model: Model) -> None:
    """Not from when its body has come."""
    asked = read_request({"prompt": "a", "max_tokens": 1})

    async def left(service: Service, seconds_ago: float) -> float:
        begun = time.monotonic() - seconds_ago
        request = Followed(id="a", method="POST", path="/", client="-", begun=begun)
        work = service.open(asked, request)
        work.end()
        assert work.deadline is not None
        return work.deadline - asyncio.get_running_loop().time()

    with Service(model, NAME, Limits(request_seconds=100)) as service:
        service.start()
        assert asyncio.run(left(service, 0)) == pytest.approx(100, abs=10)
        assert asyncio.run(left(service, 70)) == pytest.approx(30, abs=10)


def test_lines_for_programs() -> None:
    record = logging.LogRecord("neo_server.access", 20, "", 0, "a %s", ("b",), None)
    record.created, record.msecs = 1.25, 250.0
    record.facts = {"status": 200, "request_id": "x"}
    assert json.loads(JsonLines().format(record)) == {
        "time": "1970-01-01T00:00:01.250Z",
        "level": "INFO",
        "logger": "neo_server.access",
        "message": "a b",
        "status": 200,
        "request_id": "x",
    }
    try:
        raise ValueError("odd")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    assert "ValueError: odd" in json.loads(JsonLines().format(record))["exception"]


def test_a_flood_of_lines_is_one() -> None:
    def line(text: str) -> logging.LogRecord:
        error = OSError(24, "Too many open files")
        return logging.LogRecord("asyncio", 40, "", 0, text, None, (OSError, error, None))

    rarely = Rarely()
    floods = [line("socket.accept() out of system resource\nsocket: 3") for _ in range(50)]
    assert [rarely.filter(one) for one in floods] == [True] + [False] * 49
    assert "Too many open files" in floods[0].getMessage()
    assert "raise the limit of open files" in floods[0].getMessage()
    assert floods[0].exc_info is None
    assert all(rarely.filter(line("another")) for _ in range(3))


@pytest.mark.parametrize("sent", ["", "POST /v1/comp", head(60) + '{"pro'])
def test_who_does_not_write_is_dropped(
    model: Model, monkeypatch: pytest.MonkeyPatch, sent: str
) -> None:
    monkeypatch.setattr(connections, "_READ_SECONDS", 0.3)
    with served(model) as running, closing(raw(running, sent)) as connection:
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        if "{" in sent:
            until(lambda: metric(running, 'neo_requests_total{status="499"}') == 1)


def test_who_has_written_is_not(model: Model, monkeypatch: pytest.MonkeyPatch, slow: None) -> None:
    """Neither while it is answered, nor between two requests."""
    monkeypatch.setattr(connections, "_READ_SECONDS", 0.3)
    with served(model) as running:
        body = json.dumps(LONG | {"max_tokens": 30})
        connection = running.send(LONG | {"max_tokens": 30})
        with closing(connection):
            assert len(json.load(connection.getresponse())["choices"]) == 1
            time.sleep(0.5)
            connection.request("POST", "/v1/completions", body)
            assert connection.getresponse().status == 200


def test_who_does_not_read_a_whole_answer_is_dropped(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def small(host: str, port: int) -> socket.socket:
        """The system keeps little of what nobody reads."""
        sock = bound(host, port)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return sock

    monkeypatch.setattr(serving, "bound", small)
    monkeypatch.setattr(connections, "_UNREAD_SECONDS", 0.3)
    asked = {"prompt": [[5] * 400] * 10, "echo": True, "logprobs": 20, "max_tokens": 0}
    with served(model) as running:
        body = json.dumps(asked)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", running.port))
            connection.sendall((head(len(body)) + body).encode())
            until(lambda: "stopped reading" in caplog.text)
        running.wait_until_idle()


def test_bodies_that_are_not_read(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(text: str) -> str:
        with closing(raw(server, text)) as connection:
            said = b""
            while not said.endswith(b"}"):
                said += connection.recv(4096)
            return said.decode()

    # Before a client is told to go on, and sends it.
    assert told(head(5_000_000, "Expect: 100-continue")).startswith("HTTP/1.1 413")
    assert told(head(4, "Content-Encoding: gzip") + "\x1f\x0b\x08\x00").startswith("HTTP/1.1 415")
    # Half of it is read; with another half it would be more than all may have.
    monkeypatch.setattr(bodies, "_ALL_BODIES", 0.00001)
    half = told(head(4_000_000) + "x" * 1000)
    assert half.startswith("HTTP/1.1 503")
    assert "too many request bodies are being read" in half
    monkeypatch.undo()
    assert server.answer({"prompt": "a"})[0] == 200, "what was read is given back"


def test_what_was_read_is_given_back() -> None:
    """Also of those that were refused: all together could hold sixteen of them."""

    async def one(reader: bodies.Bodies, size: int) -> bytes:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"x" * size, "more_body": False}

        return bytes(await reader.read(Request({"type": "http", "headers": []}, receive)))

    async def all_of_them() -> None:
        reader = bodies.Bodies(10)
        for _ in range(40):
            assert await one(reader, 10) == b"x" * 10
            with pytest.raises(ApiError, match="more than 10 bytes"):
                await one(reader, 11)
        reader.end()
        with pytest.raises(ApiError, match="shutting down"):
            await one(reader, 1)

    asyncio.run(all_of_them())


def test_streams_are_counted_by_their_end(
    model: Model, monkeypatch: pytest.MonkeyPatch, slow: None
) -> None:
    with served(model, max_batch_size=2) as running:
        stream = LONG | {"stream": True}
        with closing(running.send(stream)) as connection:
            response = connection.getresponse()
            assert response.readline().startswith(b"data")
            until(lambda: metric(running, "neo_generated_tokens_total") > 5)
            assert metric(running, 'neo_requests_total{status="200"}') == 0, "it goes on"
            response.close()
        running.wait_until_idle()
        until(lambda: metric(running, 'neo_requests_total{status="499"}') == 1)
        assert metric(running, "neo_time_to_first_token_seconds_count") == 1
        assert metric(running, "neo_queue_seconds_count") == 1
        assert metric(running, 'neo_sequences_total{finish_reason="cancelled"}') == 1

        def broken(*_: Any) -> Any:
            raise ValueError("a step failed")

        monkeypatch.setattr(CachedModel, "decode_step", broken)
        with closing(running.send(stream)) as connection:
            assert b'"error"' in connection.getresponse().read()
        until(lambda: metric(running, 'neo_requests_total{status="500"}') == 1)
        until(lambda: metric(running, 'neo_sequences_total{finish_reason="error"}') == 1)
        monkeypatch.undo()
        with closing(running.send(stream | {"max_tokens": 3})) as connection:
            assert connection.getresponse().read().endswith(b"[DONE]\n\n")
        until(lambda: metric(running, 'neo_requests_total{status="200"}') == 1)
        assert metric(running, "neo_request_seconds_count") == 3


def test_who_has_no_key_is_counted(model: Model) -> None:
    with served(model, keys=("right",)) as running:
        assert running.answer({"prompt": "a"})[0] == 401
        until(lambda: metric(running, 'neo_requests_total{status="401"}') == 1)


def test_what_is_served_is_told(model: Model) -> None:
    with served(model, max_batch_size=3, max_queue=9) as running:
        text = running.get("/metrics")[1]
        assert metric(running, "neo_batch_limit") == 3
        assert metric(running, "neo_queue_limit") == 9
        assert metric(running, "process_resident_memory_bytes") > 2**20
        version = json.loads(running.get("/version")[1])["version"]
    assert re.search(
        rf'neo_info{{.*model="{NAME}",precision="fp32",version="{version}"}} 1.0', text
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(model: Model, slow: None, stream: bool) -> None:
    with served(model, request_seconds=0.5) as running:
        with closing(running.send(LONG | {"stream": stream})) as connection:
            response = connection.getresponse()
            last = response.read().strip().split(b"\n\n")[-1].removeprefix(b"data: ")
        error = json.loads(last)["error"]
        assert error["code"] == "timeout"
        assert "longer than the 0.5 s that this server gives" in error["message"]
        assert response.status == (200 if stream else 504)
        until(lambda: metric(running, 'neo_requests_total{status="504"}') == 1)
        running.wait_until_idle()
        assert running.answer({"prompt": "a", "max_tokens": 1})[0] == 200


def test_no_request_takes_every_place(model: Model) -> None:
    with served(model, max_queue=8) as running:
        status, answer, _ = running.answer({"prompt": ["a", "b"], "n": 3})
        assert status == 400
        assert "asks for 6 sequences, and at most 4 are taken of one" in answer["error"]["message"]
        assert running.answer({"prompt": ["a", "b"], "n": 2, "max_tokens": 1})[0] == 200
    with served(model, max_queue=8, max_sequences=6) as running:
        assert running.answer({"prompt": ["a", "b"], "n": 3, "max_tokens": 1})[0] == 200
    assert Limits(max_queue=1).most_sequences == 1
    assert Limits(max_queue=3, max_sequences=9).most_sequences == 3


def test_a_small_request_does_not_wait_for_all_of_a_large_one(
    model: Model, monkeypatch: pytest.MonkeyPatch, slow: None
) -> None:
    groups: list[object] = []
    submit = Scheduler.submit

    def noted(self: Scheduler, *arguments: Any, **options: Any) -> Any:
        groups.append(options["group"])
        return submit(self, *arguments, **options)

    monkeypatch.setattr(Scheduler, "submit", noted)
    with served(model, max_batch_size=2) as running:
        large = running.send(LONG | {"n": 20, "max_tokens": 20})
        until(lambda: len(groups) == 20)
        assert running.answer({"prompt": "a", "max_tokens": 2})[0] == 200
        assert running.service.room.inside > 10
        large.close()
        running.wait_until_idle()
    assert len(set(groups[:20])) == 1
    assert groups[20] != groups[0]


def test_prompts_keep_their_last_tokens(model: Model) -> None:
    with served(model, max_length=40) as running:
        fields = {"prompt": [list(range(1000, 1080))], "max_tokens": 4, "echo": True}
        assert running.answer(fields)[0] == 400
        for asked, kept in ((7, 7), (-1, 36)):
            status, answer, _ = running.answer(fields | {"truncate_prompt_tokens": asked})
            assert (status, answer["usage"]["prompt_tokens"]) == (200, kept)
            assert model.tokenizer is not None
            last = model.tokenizer.decode(list(range(1080 - kept, 1080)), skip_special_tokens=False)
            assert answer["choices"][0]["text"].startswith(last)
        text = {"prompt": "a " * 60_000, "max_tokens": 4, "truncate_prompt_tokens": 5}
        assert running.answer(text)[1]["usage"]["prompt_tokens"] == 5
        status, answer, _ = running.answer(text | {"prompt": "a" * (2**18 + 1)})
        assert (status, answer["error"]["param"]) == (400, "prompt")
        assert "too long to be tokenized, expected at most 262144" in answer["error"]["message"]
        status, answer, _ = running.answer(text | {"truncate_prompt_tokens": -1, "max_tokens": 40})
        assert "no room for a prompt" in answer["error"]["message"]
        for wrong in (0, -2, "5"):
            assert running.answer(text | {"truncate_prompt_tokens": wrong})[0] == 400


def test_what_would_be_ignored_is_refused(server: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    status, answer, _ = server.answer({"prompt": "a", "stream": True, "stream_options": options})
    assert status == 400
    assert "continuous_usage_stats is not supported" in answer["error"]["message"]
    options["continuous_usage_stats"] = False
    with closing(server.send({"prompt": "a", "stream": True, "stream_options": options})) as sent:
        assert sent.getresponse().status == 200


def test_scores_at_the_end(model: Model) -> None:
    scorer = PromptScorer(model)
    scorer.close()
    with pytest.raises(ApiError, match="shutting down") as refused:
        asyncio.run(scorer.scores(model.encode_prompts(("a b c",))[0], 0))
    assert refused.value.status == 503


def test_more_memory_than_there_is(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = model.cache_bytes(1, 512)
    weights = model.manifest.files["weights.bin"].size
    free = int((5 * one + weights) * 8 / 7) + 1
    monkeypatch.setattr("neo_runtime.generation.fitting.available_memory", lambda: free)
    with Service(model, NAME, Limits()) as service:
        service.start()
        assert service.batch == 4
        assert service.described.startswith("4 sequences of up to 512 tokens at once, their cache")
    assert "the system will end it" not in caplog.text
    with Service(model, NAME, Limits(max_batch_size=9)) as service:
        service.start()
        assert service.batch == 9
    assert "the system will end it; choose a smaller --max-batch-size" in caplog.text


def test_threads_of_metrics_do_not_wait(model: Model) -> None:
    """What ends sequences counts them: in the scheduler's thread, and in the loop's."""
    with served(model, max_batch_size=4) as running:
        threads = [
            threading.Thread(target=running.answer, args=({"prompt": "a", "n": 3},))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert metric(running, "neo_queue_seconds_count") == 18
