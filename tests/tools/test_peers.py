from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.models import DEMO
from neo_runtime.errors import DependencyError, NeoError, RequestError
from neo_tools.bench.participants import BandwidthWorker, NeoWorker
from neo_tools.peers import client, environments
from neo_tools.peers.client import Peer
from neo_tools.peers.environments import peer_environ
from neo_tools.worker.client import Worker
from neo_tools.worker.engine import context_ids
from neo_tools.worker.engine_client import EngineWorker
from neo_tools.worker.environ import worker_environ

START = Path(environments.__file__).with_name("worker_start.py")

FAKE_WORKER = """
import json, os, sys, time
print("a library's greeting", file=sys.stderr)
for line in sys.stdin:
    request = json.loads(line)
    op = request["op"]
    if op == "load":
        answer = {"ok": True, "seconds": 0.5, "versions": {"fake": "1"},
                  "details": {"threads": os.environ["OMP_NUM_THREADS"]}}
    elif op == "prefill":
        answer = {"ok": True, "seconds": 0.25, "tokens": [sum(row) for row in request["ids"]]}
    elif op == "decode" and request["n"] == 13:
        print("the last words", file=sys.stderr)
        sys.exit(7)
    elif op == "decode" and request["n"] == 14:
        time.sleep(60)
    elif op == "decode" and request["n"] == 15:
        print("chatter", flush=True)
        continue
    elif op == "decode":
        answer = {"ok": True, "seconds": [0.125] * request["n"], "tokens": [[9]] * request["n"]}
    elif op == "memory":
        answer = {"ok": True, "rss": 30, "rss_anon": 20, "pss": 10}
    elif op == "quit":
        break
    else:
        answer = {"ok": False, "error": f"cannot {op}"}
    print(json.dumps(answer), flush=True)
"""


def fake_worker(tmp_path: Path, timeout: float = 20.0, threads: int = 1) -> EngineWorker:
    script = tmp_path / "fake.py"
    script.write_text(FAKE_WORKER, encoding="utf-8")
    return EngineWorker(
        [sys.executable, str(script)],
        title="the peer fake",
        environ=worker_environ(threads),
        timeout=timeout,
    )


def test_client_returns_what_the_worker_says(tmp_path: Path) -> None:
    with fake_worker(tmp_path, threads=3) as peer:
        loaded = peer.load()
        assert loaded.seconds == 0.5
        assert loaded.versions == {"fake": "1"}
        assert loaded.details == {"threads": "3"}
        assert peer.prefill([1, 2, 3]).tokens == [6]
        assert peer.prefill([[1, 2], [3, 4]]).tokens == [3, 7]
        decoded = peer.decode(2)
        assert decoded.seconds == [0.125, 0.125]
        assert decoded.tokens == [[9], [9]]
        memory = peer.memory()
        assert (memory.rss, memory.rss_anon, memory.pss) == (30, 20, 10)
        process = peer._process
    assert process is not None
    assert process.returncode == 0
    with pytest.raises(NeoError, match="inside a `with` block"):
        peer.load()


def test_client_reports_a_request_that_failed_and_goes_on(tmp_path: Path) -> None:
    with fake_worker(tmp_path) as peer:
        with pytest.raises(NeoError, match="could not context: cannot context"):
            peer.context(5)
        assert peer.prefill([2]).tokens == [2]


def test_client_reports_a_worker_that_dies(tmp_path: Path) -> None:
    with fake_worker(tmp_path) as peer, pytest.raises(DependencyError) as caught:
        peer.decode(13)
    assert "status 7" in str(caught.value)
    assert "the last words" in str(caught.value)


def test_client_ends_a_worker_that_takes_too_long(tmp_path: Path) -> None:
    with fake_worker(tmp_path, timeout=0.5) as peer:
        process = peer._process
        with pytest.raises(NeoError, match="did not answer decode"):
            peer.decode(14)
        assert process is not None
        assert process.returncode is not None


def test_client_reports_chatter_between_answers(tmp_path: Path) -> None:
    with fake_worker(tmp_path) as peer, pytest.raises(NeoError, match="'chatter"):
        peer.decode(15)


def test_a_worker_of_this_interpreter_runs_the_same_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    code = "import sys; import only_here; [print('{\"ok\": true}', flush=True) for _ in sys.stdin]"
    with Worker([sys.executable, "-c", code], title="it", timeout=20) as worker:
        assert worker.ask("anything") == {"ok": True}


def test_the_benchs_own_workers_do_too(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    for worker in (
        NeoWorker("mini", mini_bundle, threads=3),
        BandwidthWorker(threads=3, size=None, timeout=1),
    ):
        assert worker._environ["PYTHONPATH"] == "/somewhere"


def test_client_says_how_to_set_up_a_missing_environment(tmp_path: Path) -> None:
    peer = Peer("openvino", DEMO, root=tmp_path)
    with pytest.raises(DependencyError) as caught:
        peer.__enter__()
    assert f"python -m neo_tools.peers setup openvino --root {tmp_path}" in str(caught.value)


def test_client_says_how_to_set_up_an_environment_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "python_of", lambda name, root: tmp_path / "none")
    with (
        pytest.raises(
            DependencyError, match=r"the peer torch does not start: .*setup torch` again"
        ),
        Peer("torch", DEMO),
    ):
        pass


def test_client_refuses_what_is_no_peer() -> None:
    with pytest.raises(DependencyError, match="no peer is called 'fake'"):
        Peer("fake", DEMO)


def test_client_refuses_no_threads() -> None:
    with pytest.raises(RequestError, match="threads is 0"):
        Peer("torch", DEMO, threads=0)


def greedy(ids: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Hugging Face's own generate, eager, eos held back; [batch][new_tokens]."""
    import torch
    from transformers import GPTNeoForCausalLM

    model: Any = GPTNeoForCausalLM.from_pretrained(
        DEMO, dtype=torch.float32, attn_implementation="eager"
    )
    inputs = torch.tensor(ids)
    output = model.eval().generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    rows: list[list[int]] = output[:, inputs.shape[1] :].tolist()
    return rows


def peer_tokens(peer: EngineWorker, length: int, steps: int) -> list[list[int]]:
    """The same continuation through the protocol: a context of two rows, then steps."""
    first = peer.context(length, batch=2, seed=3)
    assert first.seconds > 0
    decoded = peer.decode(steps)
    assert len(decoded.seconds) == steps
    assert min(decoded.seconds) > 0
    return [list(row) for row in zip(first.tokens, *decoded.tokens, strict=True)]


def test_torch_worker_equals_generate() -> None:
    # 300: past the local window (64), and fed in two pieces.
    expected = greedy(context_ids(300, 2, 3, 4096), 41)
    options = ["--model", str(DEMO), "--precision", "fp32", "--threads", "1"]
    command = [sys.executable, str(START), "worker_torch", *options]
    with EngineWorker(command, title="torch", environ=peer_environ(1), timeout=120) as peer:
        loaded = peer.load()
        assert loaded.details["dtype"] == "torch.float32"
        assert loaded.details["threads"] == 1
        assert "transformers" in loaded.versions
        assert peer_tokens(peer, 300, 40) == expected
        whole = peer.prefill(context_ids(300, 2, 3, 4096))
        assert whole.tokens == [row[0] for row in expected]
        assert peer.memory().rss_anon > 0


@pytest.mark.parametrize("name", ["optimum", "openvino"])
def test_peer_equals_generate(name: str) -> None:
    if not environments.is_ready(name):
        pytest.skip(f"no environment; run `python -m neo_tools.peers setup {name}`")
    expected = greedy(context_ids(300, 2, 3, 4096), 41)
    with Peer(name, DEMO, precision="fp32", timeout=120) as peer:
        peer.load()
        # A single row first: what is left of it must not show in the batch behind it.
        alone = peer.context(300, batch=1, seed=3)
        assert alone.tokens == expected[0][:1]
        assert peer_tokens(peer, 300, 40) == expected


def test_openvino_int8_survives_a_change_of_batch() -> None:
    if not environments.is_ready("openvino"):
        pytest.skip("no environment; run `python -m neo_tools.peers setup openvino`")
    with Peer("openvino", DEMO, precision="int8", timeout=120) as peer:
        peer.load()
        expected = peer_tokens(peer, 300, 5)
    with Peer("openvino", DEMO, precision="int8", timeout=120) as peer:
        peer.load()
        peer.context(300, batch=1, seed=3)
        peer.decode(1)
        assert peer_tokens(peer, 300, 5) == expected
