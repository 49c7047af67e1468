"""Real processes: bundles of the demo model, and a made-up peer that speaks the protocol."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from neo_runtime.backends.step_logits import StepLogits
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.errors import CheckpointError, NeoError, RequestError
from neo_tools.bench import machine, rounds, starting
from neo_tools.bench import participants as participants_module
from neo_tools.bench.cases import Case, PeerChoice, Settings, make_cases
from neo_tools.bench.native_time import native_seconds
from neo_tools.bench.participants import (
    BandwidthWorker,
    NeoWorker,
    Overhead,
    Participant,
    rotated,
)
from neo_tools.bench.rounds import measure_case
from neo_tools.bench.rows import FLOAT32_DECODE
from neo_tools.bench.run import run
from neo_tools.bench.spread import spread
from neo_tools.bench.worker import NeoEngine
from neo_tools.older_cpu import ENVIRONMENT_VARIABLE
from neo_tools.worker.engine import context_ids
from neo_tools.worker.engine_client import (
    DecodeResult,
    EngineWorker,
    MemoryResult,
    PrefillResult,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from neo_tools.bench.results import Results

FAKE = """
import json, sys
from neo_tools.worker.engine import engine_handlers
from neo_tools.worker.protocol import claim_stdout, serve

class Fake:
    vocab_size, max_length, packages = 4096, 512, ()
    def load(self):
        return {"KV_CACHE_PRECISION": "<Type: 'uint8_t'>"}
    def reset(self):
        pass
    def forward(self, ids):
        with open(sys.argv[1], "a") as stream:
            stream.write(json.dumps(ids) + "\\n")
        return [7] * len(ids)

answers = claim_stdout()
serve(engine_handlers(Fake()), sys.stdin, answers)
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The fake peer of `results`."""
    return _fake_command(tmp_path_factory.mktemp("fake"))


def _fake_command(folder: Path) -> list[str]:
    """A program that speaks the protocol and writes the ids that it gets to its last argument."""
    (folder / "fake.py").write_text(FAKE)
    return [sys.executable, str(folder / "fake.py"), str(folder / "ids.jsonl")]


@pytest.fixture(scope="module")
def settings(mini_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    lists: dict[str, Any] = {
        "prompts": (12,),
        "new_tokens": (3,),
        "depths": (20,),
        "batches": (2,),
        "threads": (1,),
    }
    model = tmp_path_factory.mktemp("checkpoint")
    (model / "config.json").write_text((mini_bundle / "config.json").read_text())
    return Settings(
        bundles=(mini_bundle,),
        peers=(PeerChoice(name="openvino", precision="int8"),),
        model=model,
        **lists,
        repetitions=3,
        seed=5,
        probe_bytes=1 << 20,
        timeout=60,
        cases=make_cases(**lists),
    )


@pytest.fixture(scope="module")
def results(settings: Settings, fake: list[str]) -> Iterator[Results]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starting, "Peer", lambda *_, **options: EngineWorker(fake, title="fake"))
        patch.setenv(ENVIRONMENT_VARIABLE, "AVX-512 and AMX")
        patch.setattr(machine, "l3_bytes", lambda: 32 << 20)
        yield run(settings, lambda line: None)


def test_hidden_instructions_are_in_the_report(results: Results) -> None:
    assert any(line.startswith("AVX-512 and AMX are hidden") for line in results.warnings)


def test_weights_that_the_cache_holds_are_in_the_report(results: Results) -> None:
    assert any(line.startswith("the weights of cpu (") for line in results.warnings)


def test_what_the_runtime_warns_of_is_in_the_report(
    settings: Settings, mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its cache folder a bundle is slower, and holds weights once a graph."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("NEO_CACHE_DIR", str(tmp_path / "file"))
    alone = replace(
        settings, peers=(), model=None, repetitions=1, keep_prepacked=True, cases=settings.cases[:1]
    )
    found = run(alone, lambda line: None)
    name = mini_bundle.name
    assert any(line.startswith(f"{name}: prepacked weights cannot") for line in found.warnings)
    [bundle] = found.participants
    assert bundle.prepacked_bytes == 0


def test_rates_are_tokens_over_seconds(results: Results) -> None:
    assert [(r.label, r.test) for r in results.rows] == [
        ("cpu", "pp12"),
        ("openvino:int8", "pp12"),
        ("cpu", "tg3 @ d20"),
        ("openvino:int8", "tg3 @ d20"),
    ]
    for row in results.rows:
        tokens = 2 * (row.prompt or row.new_tokens)
        assert len(row.round_seconds) == 3
        assert row.tokens_per_second.median == tokens / median(row.round_seconds)
        assert row.tokens_per_second.min == tokens / max(row.round_seconds)


def test_latency_and_rate_belong_together(results: Results) -> None:
    prefill, decode = results.rows[0], results.rows[2]
    assert prefill.first_token_seconds == median(prefill.round_seconds)
    assert decode.token_p50_seconds is not None
    assert decode.token_p99_seconds is not None
    assert decode.step_bytes is not None
    assert decode.read_rate is not None
    assert 0 < decode.token_p50_seconds <= decode.token_p99_seconds <= max(decode.round_seconds)
    assert decode.read_rate == pytest.approx(decode.step_bytes * 3 / median(decode.round_seconds))
    [limits] = results.limits
    assert limits.read[FLOAT32_DECODE] == decode.read_rate
    # Before loading; of both cases, before the first of three rounds and after each.
    assert len(limits.rounds) == 1 + 2 * (1 + 3)
    assert max(limits.rounds) == max(r for n, r in limits.read.items() if n != FLOAT32_DECODE)
    assert decode.limit_share == decode.read_rate / limits.bandwidth
    beside = [max(pair) for pair in pairwise(limits.rounds[-4:])]
    shares = [
        decode.step_bytes * 3 / seconds / reading
        for seconds, reading in zip(decode.round_seconds, beside, strict=True)
    ]
    assert decode.round_limit_share == spread(shares)
    assert set(limits.read) >= {"numpy max", "numpy dot", "onnxruntime MatMul"}
    assert min(*limits.read.values(), *limits.peak.values()) > 0


def test_ratios_belong_to_the_rows(results: Results) -> None:
    seconds = {(row.label, row.test): row.round_seconds for row in results.rows}
    assert [ratio.test for ratio in results.ratios] == ["pp12", "tg3 @ d20"]
    for ratio in results.ratios:
        others, ours = seconds[ratio.other, ratio.test], seconds[ratio.bundle, ratio.test]
        assert ratio.rounds == tuple(a / b for a, b in zip(others, ours, strict=True))
        assert ratio.spread.median == median(ratio.rounds)


def test_memory_loading_and_python_are_reported(results: Results, mini_bundle: Path) -> None:
    ours, peer = results.participants
    decode = results.rows[2]
    assert ours.weights_bytes == (mini_bundle / "weights.bin").stat().st_size
    assert ours.first_token_seconds is not None
    assert ours.first_token_excess_seconds is not None
    assert 0 < ours.first_token_excess_seconds < ours.first_token_seconds
    assert ours.import_seconds is not None
    assert ours.first_load_seconds is not None
    assert ours.first_load_seconds > 0
    assert ours.load_seconds > 0
    assert "onnxruntime" in ours.versions
    assert peer.first_token_seconds is None
    assert decode.private_bytes is not None
    assert decode.proportional_bytes is not None
    # All weights were read, and are the file's own pages.
    assert decode.proportional_bytes > ours.weights_bytes
    assert decode.proportional_bytes > decode.private_bytes > 1 << 20
    # 32 positions (23 rounded up) in the global layers, the window of 64 in the local ones;
    # 2 rows, keys and values, 3 heads of 64 float32.
    assert decode.cache_bytes in (2 * 2 * 3 * 64 * 4 * 4 * 32, 2 * 2 * 3 * 64 * 4 * 2 * (32 + 64))
    assert decode.python_seconds is not None
    assert decode.generate_python_seconds is not None
    assert decode.python_seconds > 0
    assert decode.generate_python_seconds > 0


def test_peer_gets_the_same_ids_and_nominal_bytes(results: Results, fake: list[str]) -> None:
    fed = [json.loads(line) for line in Path(fake[2]).read_text().splitlines()]
    prompt = context_ids(12, 2, 5, 4096)
    assert fed[:4] == [prompt] * 4  # a warm-up and three rounds
    deep = [ids for ids in fed if len(ids[0]) == 20]
    assert deep == [context_ids(20, 2, 5, 4096)] * 3
    peer = results.rows[3]
    body = 4 * (4 * 192 * 192 + 2 * 192 * 768) + 4096 * 192
    # A cache of one byte an element, as the peer said; 21, 22 and 23 positions, 4 layers.
    assert peer.step_bytes == body + 2 * 2 * 192 * 4 * 22


def test_checkpoint_must_be_the_bundles(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a Hugging Face model folder"):
        run(replace(settings, model=tmp_path), lambda line: None)
    config = json.loads((settings.bundles[0] / "config.json").read_text()) | {"hidden_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another model than the bundle"):
        run(replace(settings, model=tmp_path), lambda line: None)
    with pytest.raises(RequestError, match="--model"):
        run(replace(settings, model=None), lambda line: None)


class InProcess:
    """A worker that is no process: notes who was asked what."""

    def __init__(self, label: str, log: list[tuple[str, str]]) -> None:
        self.label, self.log = label, log

    def prefill(self, ids: list[list[int]]) -> PrefillResult:
        self.log.append((self.label, f"prefill {len(ids)}x{len(ids[0])}"))
        return PrefillResult(seconds=1.0, tokens=[0])

    def context(self, length: int, *, batch: int, seed: int) -> PrefillResult:
        self.log.append((self.label, f"context {length}"))
        return PrefillResult(seconds=1.0, tokens=[0] * batch)

    def decode(self, n: int) -> DecodeResult:
        self.log.append((self.label, f"decode {n}"))
        return DecodeResult(seconds=[0.5] * n, tokens=[[0]] * n)

    def memory(self) -> MemoryResult:
        return MemoryResult(rss=3, rss_anon=1, pss=2)


@pytest.fixture
def three(
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[list[Participant], list[tuple[str, str]]]:
    """Three participants, and what they were asked and when they were stopped and woken."""
    log: list[tuple[str, str]] = []

    def note(self: Participant, name: str) -> None:
        log.append((self.label, name))

    monkeypatch.setattr(Participant, "_signal", note)
    made = [
        Participant(label=label, kind="peer", precision="fp32", worker=InProcess(label, log))
        for label in "abc"
    ]
    return made, log


def test_rounds_rotate_and_only_one_runs(
    three: tuple[list[Participant], list[tuple[str, str]]],
) -> None:
    participants, log = three
    case = Case(kind="decode", threads=1, batch=2, new_tokens=4, depth=30)
    settings = Settings(bundles=(), repetitions=3, cases=(case,))
    pauses: list[int] = []
    readings = [3.0, 2.0, 5.0, 4.0]

    def between() -> float:
        pauses.append(sum(what == "decode 4" for _, what in log))
        return readings[len(pauses) - 1]

    found = measure_case(
        case,
        participants,
        settings,
        99,
        progress=lambda line: None,
        between=between,
    )
    assert [label for label, what in log if what == "decode 4"] == list("abcbaccab")
    assert [what for label, what in log if label == "a" and "SIG" not in what] == [
        *("context 16", "decode 2"),
        *("context 30", "decode 4") * 3,
    ]
    assert pauses == [0, 3, 6, 9]
    assert [found[label].readings for label in "abc"] == [[3.0, 5.0, 5.0]] * 3
    running: set[str] = set()
    for label, what in log:
        if what == "SIGCONT":
            assert not running
            running.add(label)
        elif what == "SIGSTOP":
            running.remove(label)
        else:
            assert running == {label}
    assert not running
    assert found["b"].seconds == (2.0, 2.0, 2.0)
    assert found["b"].memory == MemoryResult(rss=3, rss_anon=1, pss=2)


def test_context_may_be_kept_and_warmup_left_out(
    three: tuple[list[Participant], list[tuple[str, str]]],
) -> None:
    participants, log = three
    case = Case(kind="decode", threads=1, batch=1, new_tokens=4, depth=30)
    settings = Settings(bundles=(), repetitions=2, warmup=False, keep_context=True)
    measure_case(
        case, participants[:1], settings, 99, progress=lambda line: None, between=lambda: 1.0
    )
    asked = [what for _, what in log if "SIG" not in what]
    assert asked == ["context 30", "decode 4", "decode 4"]
    log.clear()
    prefill = Case(kind="prefill", threads=1, batch=2, prompt=6)
    measure_case(
        prefill, participants[:1], settings, 99, progress=lambda line: None, between=lambda: 1.0
    )
    assert [what for _, what in log if "SIG" not in what] == ["prefill 2x6"] * 2


def test_rotated_starts_one_further_each_round(
    three: tuple[list[Participant], list[tuple[str, str]]],
) -> None:
    orders = ["".join(p.label for p in rotated(three[0], index)) for index in range(4)]
    assert orders == ["abc", "bac", "cab", "acb"], "and nobody keeps the one before him"
    assert rotated([], 2) == []


def _state(pid: int) -> str:
    """Of proc(5): R, S, T (stopped), …"""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_participants_are_stopped_between_their_turns(tmp_path: Path) -> None:
    worker = EngineWorker(_fake_command(tmp_path), title="the peer fake", timeout=30)
    participant = Participant(label="fake", kind="peer", precision="fp32", worker=worker)
    with participants_module.Guard() as guard:
        participant.guard = guard
        with participant:
            for _ in range(2):
                with participant.turn() as running:
                    running.load()
                    assert running.prefill([1, 2]).tokens == [7]
                    assert _state(worker.pid) != "T"
                assert _stopped(worker.pid)
            with pytest.raises(NeoError, match="could not context"), participant.turn() as running:
                running.context(1000)
            assert _stopped(worker.pid)
    assert not Path(f"/proc/{guard._process.pid}/stat").exists()


def _stopped(pid: int) -> bool:
    for _ in range(200):  # the signal takes a moment to arrive
        if _state(pid) == "T":
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_workers_end_when_the_bench_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from neo_tools.bench.participants import Guard, Participant\n"
        "from neo_tools.worker.engine_client import EngineWorker\n"
        "worker = EngineWorker(sys.argv[1:], title='fake')\n"
        "with Guard() as guard:\n"
        "    made = Participant(label='a', kind='peer', precision='', worker=worker, guard=guard)\n"
        "    with made:\n"
        "        with made.turn(): worker.load()\n"
        "        print(worker.pid, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *_fake_command(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        start_new_session=True,
    )
    pid = int(done.stdout)
    for _ in range(500):
        if not Path(f"/proc/{pid}/stat").exists() or _state(pid) == "Z":
            return
        time.sleep(0.01)
    state = _state(pid)
    os.kill(pid, signal.SIGKILL)
    pytest.fail(f"the worker {pid} is still there, in state {state}")


@pytest.mark.parametrize(("on_gpu", "depth"), [(False, 16), (True, 128)])
def test_the_turn_that_does_not_count_is_as_deep_as_a_compiler_needs(
    on_gpu: bool, depth: int
) -> None:
    asked: list[int] = []
    worker: Any = SimpleNamespace(
        context=lambda length, **_: asked.append(length), decode=lambda steps: None
    )
    case: Any = SimpleNamespace(kind="decode", depth=128, batch=1, new_tokens=32)
    settings: Any = SimpleNamespace(warmup=True, seed=1, on_gpu=on_gpu)
    rounds._prepare(case, worker, settings, [], rounds.CaseRecord())
    assert asked == [depth]


def test_native_seconds_see_every_call_and_leave_no_trace(mini_bundle: Path) -> None:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state

    native = onnxruntime_pybind11_state.InferenceSession
    before = native.run_with_iobinding
    session = onnxruntime.InferenceSession(
        str(mini_bundle / "score.onnx"), providers=["CPUExecutionProvider"]
    )
    feeds = {
        i.name: np.zeros([d if isinstance(d, int) else 1 for d in i.shape], np.int64)
        for i in session.get_inputs()
        if "past" not in i.name
    }
    with native_seconds() as spent:
        with pytest.raises(ValueError, match="Required inputs"):
            session.run(None, feeds)  # refused in Python, before anything native
        assert spent == []
        binding = session.io_binding()
        with pytest.raises(RuntimeError, match="At least one output"):
            session.run_with_iobinding(binding)
        assert len(spent) == 1
        assert spent[0] > 0
    assert native.run_with_iobinding is before


def test_overhead_refuses_what_it_cannot_see(mini_bundle: Path) -> None:
    class Model:
        """Decodes without onnxruntime."""

        manifest = open_bundle(mini_bundle).manifest
        backend = "cpu"

        def rounded_length(self, length: int) -> int:
            return length

        def new_cache(self, batch: int, length: int) -> Any:
            return SimpleNamespace(close=lambda: None)

        def prefill_step(self, cache: Any, ids: list[list[int]]) -> StepLogits:
            return StepLogits.at_hand(np.zeros((1, 4), np.float32))

        def decode_step(self, cache: Any, tokens: list[int]) -> StepLogits:
            return StepLogits.at_hand(np.zeros((1, 4), np.float32))

    engine = NeoEngine(mini_bundle, 1, None)
    engine._opened = Model()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="no call of onnxruntime was seen"):
        engine.handlers()["overhead"]({"batch": 1, "steps": 2})


def test_overhead_is_of_the_steps_that_are_timed(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = NeoEngine(mini_bundle, 1, None)
    engine.load()
    engine.forward([[1, 2, 3]])
    widths: list[int] = []
    timed = NeoEngine.forward

    def forward(self: NeoEngine, ids: list[list[int]]) -> list[int]:
        widths.append(len(ids[0]))
        return timed(self, ids)

    monkeypatch.setattr(NeoEngine, "forward", forward)
    found = engine.handlers()["overhead"]({"batch": 2, "steps": 3})
    assert widths == [16, 1, 1, 1]
    assert min(found.values()) > 0
    kept = engine._cache
    assert kept is not None
    assert kept.lengths.tolist() == [3], "the session's own cache is as it was"


def test_worker_decodes_what_the_model_decodes(mini_bundle: Path) -> None:
    import neo_runtime

    prompt = context_ids(300, 1, 3, 4096)[0]
    with NeoWorker("mini", mini_bundle, threads=1, timeout=60) as worker:
        worker.load()
        worker.reserve(1, 305)
        first = worker.context(300, seed=3).tokens  # 256 and 44 positions
        tokens = [first[0], *(step[0] for step in worker.decode(5).tokens)]
        assert worker.score(3) > 0
        with pytest.raises(NeoError, match="wants a process that has loaded nothing"):
            worker.first_token(16)
        overhead = worker.overhead(2, 3)
        assert isinstance(overhead, Overhead)
        # `overhead` has a cache of its own: decode goes on where it was, to the cache's end.
        with pytest.raises(NeoError, match=r"320 positions and would have 321"):
            worker.decode(100)
    with neo_runtime.load(mini_bundle, threads=1) as model:
        expected = model.generate(prompt, max_new_tokens=6, ignore_eos=True).token_ids
    assert tuple(tokens) == tuple(expected)


def test_probe_measures_and_answers_errors() -> None:
    with BandwidthWorker(threads=2, size=1 << 20, timeout=60) as worker:
        assert set(worker.rates("peak")) == {"float32", "int8"}
        rates = worker.rates("read")
        assert {"numpy max", "numpy dot", "onnxruntime MatMul"} <= set(rates)
        assert all(rate > 0 for rate in rates.values())
        with pytest.raises(NeoError, match="could not dance"):
            worker.rates("dance")  # type: ignore[arg-type]
