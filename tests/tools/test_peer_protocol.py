from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from neo_runtime.errors import RequestError
from neo_tools.peers import environments
from neo_tools.worker import engine as engine_module
from neo_tools.worker.engine import context_ids, engine_handlers
from neo_tools.worker.memory import resident_of
from neo_tools.worker.protocol import serve

START = Path(environments.__file__).with_name("worker_start.py")


class CountingEngine:
    """Next token of a row: its cached length, so that every position shows in the answers."""

    vocab_size = 1000
    max_length = 600
    packages = ("neo-onnx",)

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.calls: list[tuple[int, int]] = []

    def load(self) -> dict[str, Any]:
        return {"kind": "counting"}

    def reset(self) -> None:
        self.rows = []

    def forward(self, ids: list[list[int]]) -> list[int]:
        self.calls.append((len(ids), len(ids[0])))
        self.rows = self.rows or [[] for _ in ids]
        for row, more in zip(self.rows, ids, strict=True):
            row.extend(more)
        return [len(row) for row in self.rows]


def converse(engine: CountingEngine, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    answers = io.StringIO()
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    serve(engine_handlers(engine), io.StringIO(lines), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_context_ids_are_splitmix64() -> None:
    # The generator's first two outputs from state 0, as its author publishes them.
    golden = 0x9E3779B97F4A7C15
    assert engine_module._splitmix64(0) == 0xE220A8397B1DCDAF
    assert engine_module._splitmix64(golden) == 0x6E789E6AA1B965F4
    rows = context_ids(5, 2, 0, 1 << 64)
    assert rows[0][0] == 0xE220A8397B1DCDAF
    assert rows[0] != rows[1]
    assert context_ids(5, 2, 1, 1 << 64) != rows
    small = context_ids(400, 1, 7, 11)[0]
    assert set(small) == set(range(11))


def test_serve_feeds_context_in_pieces_and_counts_positions() -> None:
    engine = CountingEngine()
    loaded, context, decoded, prefilled = converse(
        engine,
        {"op": "load"},
        {"op": "context", "length": 300, "batch": 2, "seed": 5},
        {"op": "decode", "n": 3},
        {"op": "prefill", "ids": [[4] * 300]},
    )
    assert loaded["details"] == {"kind": "counting"}
    assert "neo-onnx" in loaded["versions"]
    assert context["tokens"] == [300, 300]
    assert decoded["tokens"] == [[301, 301], [302, 302], [303, 303]]
    assert len(decoded["seconds"]) == 3
    assert prefilled["tokens"] == [300]
    assert engine.calls == [(2, 256), (2, 44), (2, 1), (2, 1), (2, 1), (1, 300)]


def test_serve_feeds_the_tokens_it_found() -> None:
    engine = CountingEngine()
    converse(engine, {"op": "load"}, {"op": "prefill", "ids": [[7, 8]]}, {"op": "decode", "n": 2})
    assert engine.rows == [[7, 8, 2, 3]]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"op": "dance"}, "unknown op 'dance'"),
        ({"op": "decode", "n": 1}, "before prefill"),
        ({"op": "prefill", "ids": [[1], [1, 2]]}, "same length"),
        ({"op": "prefill", "ids": []}, "at least one id"),
        ({"op": "context", "length": 601, "batch": 1, "seed": 0}, "the model has 600"),
    ],
)
def test_serve_answers_a_bad_request_and_goes_on(
    request_: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, bad, good = converse(
        CountingEngine(), {"op": "load"}, request_, {"op": "prefill", "ids": [[1, 2]]}
    )
    assert not bad["ok"]
    assert expected in bad["error"]
    assert "Traceback" in capsys.readouterr().err
    assert good["tokens"] == [2]


def test_a_mistake_that_has_its_own_words_leaves_no_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Refusing(CountingEngine):
        def load(self) -> dict[str, Any]:
            raise RequestError("threads is 100, expected at most 32")

    [answer] = converse(Refusing(), {"op": "load"})
    assert answer == {"ok": False, "error": "threads is 100, expected at most 32"}
    assert capsys.readouterr().err == ""


def test_serve_refuses_a_step_past_the_last_position() -> None:
    *_, last, too_far = converse(
        CountingEngine(),
        {"op": "load"},
        {"op": "context", "length": 599, "batch": 1, "seed": 0},
        {"op": "decode", "n": 1},
        {"op": "decode", "n": 1},
    )
    assert last["tokens"] == [[600]]
    assert "600 + 1 positions" in too_far["error"]


def test_serve_wants_load_first_and_stops_at_quit() -> None:
    answers = converse(
        CountingEngine(), {"op": "prefill", "ids": [[1]]}, {"op": "quit"}, {"op": "memory"}
    )
    assert "before load" in answers[0]["error"]
    assert len(answers) == 1


def test_memory_of_counts_private_bytes() -> None:
    # In a process of its own: this one may free what earlier tests left at any moment.
    code = (
        "import json, os; from neo_tools.worker.memory import memory_of\n"
        "before = memory_of(); block = bytearray(os.urandom(1)) * (64 << 20)\n"
        "print(json.dumps([before, memory_of()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    assert after["rss_anon"] - before["rss_anon"] > 60 << 20
    assert after["rss"] >= after["rss_anon"]
    assert after["pss"] > 60 << 20


def test_a_process_that_has_ended_holds_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        while "Z" not in Path(f"/proc/{process.pid}/status").read_text().split("State:")[1][:3]:
            time.sleep(0.01)
        assert resident_of(process.pid) == {"rss": 0, "rss_anon": 0}


def test_an_interrupt_ends_a_worker_without_a_traceback() -> None:
    code = (
        "import os, signal; from neo_tools.worker.protocol import claim_stdout\n"
        "claim_stdout(); os.kill(os.getpid(), signal.SIGINT)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_claimed_stdout_carries_answers_only() -> None:
    code = (
        "import os, sys; from neo_tools.worker.protocol import claim_stdout\n"
        "answers = claim_stdout(); print('python chatter'); os.write(1, b'native chatter\\n')\n"
        "answers.write('answer\\n'); answers.flush()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "answer\n"
    assert "python chatter" in done.stderr
    assert "native chatter" in done.stderr


@pytest.mark.parametrize(
    "worker", ["worker_torch", "worker_optimum", "worker_openvino", "worker_portable"]
)
def test_workers_start_without_any_package(worker: str) -> None:
    # -S: no site-packages, so nothing of this project or of anyone else can be imported.
    command = [sys.executable, "-I", "-S", str(START), worker, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout + done.stderr
