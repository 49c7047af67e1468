"""Continuous batching: requests that share steps get what each gets alone."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError
from itertools import count
from typing import TYPE_CHECKING, Any

import neo_runtime
import pytest
from helpers.hf_reference import heldout_texts, reference_continuations, varied_prompts
from helpers.kills import fork
from neo_runtime import Scheduler
from neo_runtime.backends.cpu.binding import BoundCall
from neo_runtime.cached_model import CachedModel
from neo_runtime.errors import CacheLimitError, ContextLengthError, NeoError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.generation.completion import Completion
    from neo_runtime.model import Model


@pytest.fixture(scope="module")
def model(mini_bundle: Path) -> Iterator[Model]:
    with neo_runtime.load(mini_bundle, threads=1) as loaded:
        yield loaded


class Steps:
    """The tokens that were fed to each call, prompts and decode steps; calls can be held up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prefilled: list[list[int]] = []
        self.decoded: list[int] = []
        self.go_on = threading.Event()
        self.go_on.set()
        prefill, decode = CachedModel.prefill_step, CachedModel.decode_step

        def prefill_step(model: CachedModel, cache: KVCache, prompts: Any, rows: Any = None) -> Any:
            self.wait()
            self.prefilled.append([len(prompt) for prompt in prompts])
            return prefill(model, cache, prompts, rows)

        def decode_step(model: CachedModel, cache: KVCache, tokens: Sequence[int]) -> Any:
            self.wait()
            self.decoded.append(len(tokens))
            return decode(model, cache, tokens)

        monkeypatch.setattr(CachedModel, "prefill_step", prefill_step)
        monkeypatch.setattr(CachedModel, "decode_step", decode_step)

    def wait(self) -> None:
        assert self.go_on.wait(timeout=60)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def facts(completion: Completion) -> tuple[Any, ...]:
    logprobs = [round(choice.logprob or 0.0, 3) for choice in completion.logprobs or ()]
    return completion.text, completion.token_ids, completion.finish_reason, logprobs


KINDS: list[dict[str, Any]] = [
    {"max_new_tokens": 30},
    {"max_new_tokens": 1},
    {"max_new_tokens": 40, "do_sample": True, "seed": 1},
    {"max_new_tokens": 25, "do_sample": True, "seed": 2, "top_k": 0, "repetition_penalty": 1.2},
    {"max_new_tokens": 30, "stop": ["."]},
    {"max_new_tokens": 12, "logprobs": 2},
    {"max_length": 250, "ignore_eos": True},
]


@pytest.mark.parametrize("bundle", ["mini_bundle", "portable_bundle", "cuda_bundle"])
def test_each_gets_what_it_gets_alone(bundle: str, request: pytest.FixtureRequest) -> None:
    work = [(text[: 9 + 11 * i], KINDS[i % len(KINDS)]) for i, text in enumerate(heldout_texts())]
    work = work[:20]
    with neo_runtime.load(request.getfixturevalue(bundle), backend="cpu", threads=2) as model:
        expected = [facts(model.generate(prompt, **options)) for prompt, options in work]
        found: list[Any] = [None] * len(work)
        with Scheduler(model, max_batch_size=5) as scheduler:

            def client(first: int) -> None:
                for index in range(first, len(work), 4):
                    prompt, options = work[index]
                    found[index] = facts(scheduler.submit(prompt, **options).result(timeout=120))

            clients = [threading.Thread(target=client, args=(first,)) for first in range(4)]
            for thread in clients:
                thread.start()
            for thread in clients:
                thread.join()
            assert (scheduler.active, scheduler.waiting) == (0, 0)
        assert model.cache_bytes_in_use == 0
    assert found == expected


def test_the_texts_of_transformers(model: Model) -> None:
    prompts = varied_prompts(10)
    options = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}
    expected = reference_continuations(prompts, **options)
    with Scheduler(model, max_batch_size=3) as scheduler:
        pending = [scheduler.submit(ids, **options) for ids in prompts]
        assert [[p.result(timeout=120).token_ids] for p in pending] == expected


def test_requests_join_a_running_batch(model: Model, steps: Steps) -> None:
    """And leave it: the places are taken by those that wait, in order."""
    options: dict[str, Any] = {"ignore_eos": True}
    with Scheduler(model, max_batch_size=2) as scheduler:
        steps.go_on.clear()
        first = scheduler.submit("Once upon", max_new_tokens=9, **options)
        wait_for(lambda: scheduler.active == 1)
        others = [scheduler.submit("The dog", max_new_tokens=3, **options) for _ in range(3)]
        assert scheduler.waiting == 3
        steps.go_on.set()
        for pending in [*others, first]:
            pending.result(timeout=60)
    # The first alone once; then with one other after the other, each of them for two steps.
    assert steps.decoded == [1, 2, 2, 2, 2, 2, 2, 1]
    assert [len(prompts) for prompts in steps.prefilled] == [1, 1, 1, 1]


def test_prompts_that_begin_between_two_steps_are_few(mini_bundle: Path, steps: Steps) -> None:
    with (
        neo_runtime.load(mini_bundle, threads=1, prefill_chunk=20) as model,
        Scheduler(model, max_batch_size=8) as scheduler,
    ):
        steps.go_on.clear()
        sizes = (3, 30, 8, 8, 8)
        pending = [scheduler.submit([5] * n, max_new_tokens=5, ignore_eos=True) for n in sizes]
        wait_for(lambda: scheduler.active > 0)
        steps.go_on.set()
        for one in pending:
            one.result(timeout=60)
    assert steps.prefilled == [[3], [30], [8, 8], [8]]
    assert steps.decoded[:4] == [1, 2, 4, 5]


def test_the_text_as_it_comes(model: Model) -> None:
    pieces: list[str] = []
    with Scheduler(model, max_batch_size=2) as scheduler:
        pending = scheduler.submit("Once upon a time", max_new_tokens=30, on_piece=pieces.append)
        other = scheduler.submit("The", max_new_tokens=10)
        read = list(pending)
        assert list(pending) == [], "they are given once"
        assert read == pieces
        assert len(read) > 5
        assert "".join(read) == pending.result().text
        assert "".join(other) == other.result().text
        timings = pending.result().timings
        assert 0 < timings.prefill_seconds <= timings.time_to_first_token
        assert timings.tokens_per_second > 0


def test_nobody_waits_any_more(model: Model, steps: Steps) -> None:
    """`cancel` drops a request, `should_stop` ends it with the text so far; waiting ones too."""
    asked = count()
    with Scheduler(model, max_batch_size=2) as scheduler:
        steps.go_on.clear()
        options: dict[str, Any] = {"max_new_tokens": 200, "ignore_eos": True}
        stopped = scheduler.submit("Tom", **options, should_stop=lambda: next(asked) >= 4)
        cancelled = scheduler.submit("The", **options)
        waiting = [
            scheduler.submit("A", **options),
            scheduler.submit("B", **options, should_stop=lambda: True),
            scheduler.submit("C", max_new_tokens=2, ignore_eos=True),
        ]
        wait_for(lambda: scheduler.active > 0)
        assert cancelled.cancel()
        assert waiting[0].cancel()
        steps.go_on.set()
        completion = stopped.result(timeout=60)
        assert completion.finish_reason == "cancelled"
        assert 0 < len(completion.token_ids) < 6
        assert completion.text == "".join(stopped)
        for one in (cancelled, waiting[0]):
            with pytest.raises(CancelledError):
                one.result(timeout=60)
            assert isinstance(list(one), list), "reading ends"
        nothing = waiting[1].result(timeout=60)
        assert (nothing.text, nothing.token_ids, nothing.finish_reason) == ("", (), "cancelled")
        assert len(waiting[2].result(timeout=60).token_ids) == 2
        assert not waiting[2].cancel(), "it has ended"


def test_what_one_request_does_wrong_ends_it_alone(model: Model) -> None:
    def refuse(_: str) -> None:
        raise ZeroDivisionError("the client has gone")

    def broken() -> bool:
        raise KeyError("deadline")

    everything = tuple(range(model.manifest.model.vocab_size))
    with Scheduler(model, max_batch_size=4) as scheduler:
        good = scheduler.submit("Once upon a time", max_new_tokens=20)
        bad = {
            ZeroDivisionError: scheduler.submit("The", max_new_tokens=20, on_piece=refuse),
            KeyError: scheduler.submit("The", max_new_tokens=20, should_stop=broken),
            RequestError: scheduler.submit("The", max_new_tokens=20, suppress_tokens=everything),
        }
        for kind, pending in bad.items():
            with pytest.raises(kind):
                pending.result(timeout=60)
            with pytest.raises(kind):
                list(pending)
        assert (
            good.result(timeout=60).text
            == model.generate("Once upon a time", max_new_tokens=20).text
        )


def test_a_step_that_fails_ends_those_in_it(
    model: Model, monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    run, calls = BoundCall.run, count()

    def fails_once(call: BoundCall) -> None:
        if next(calls) == 4:
            raise NeoError("the disk is gone")
        run(call)

    monkeypatch.setattr(BoundCall, "run", fails_once)
    with Scheduler(model, max_batch_size=2) as scheduler:
        steps.go_on.clear()
        pending = [scheduler.submit("The", max_new_tokens=9, ignore_eos=True) for _ in range(3)]
        wait_for(lambda: scheduler.active > 0)
        steps.go_on.set()
        for one in pending[:2]:
            with pytest.raises(NeoError, match="the disk is gone"):
                one.result(timeout=60)
        assert len(pending[2].result(timeout=60).token_ids) == 9, "the next one has a new cache"
        assert model.cache_bytes_in_use > 0
    assert model.cache_bytes_in_use == 0


def test_no_room_for_another_cache(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    """The requests that would need it end, and later ones find it again."""
    with neo_runtime.load(mini_bundle, threads=1) as loaded:
        size = loaded.cache_bytes(1, 64)
    with neo_runtime.load(mini_bundle, threads=1, max_cache_bytes=size) as model:
        with Scheduler(model, max_batch_size=1, max_length=64) as scheduler:
            with pytest.raises(CacheLimitError, match="in use"):
                Scheduler(model, max_batch_size=1, max_length=64)
            with monkeypatch.context() as patched:
                patched.setattr(BoundCall, "run", lambda _: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    scheduler.submit("The", max_new_tokens=4).result(timeout=60)
            with model.new_cache(1, 64), pytest.raises(CacheLimitError):
                scheduler.submit("The", max_new_tokens=4).result(timeout=60)
            assert scheduler.submit("The", max_new_tokens=4).result(timeout=60).text
        assert model.cache_bytes_in_use == 0


def test_its_limits(model: Model) -> None:
    for wrong in ({"max_batch_size": 0}, {"max_length": 1.5}):
        with pytest.raises(RequestError, match="expected an integer of at least 1"):
            Scheduler(model, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ContextLengthError, match="9999 positions"):
        Scheduler(model, max_length=9999)
    with Scheduler(model, max_batch_size=2, max_length=40) as scheduler:
        assert model.cache_bytes_in_use == model.cache_bytes(2, 40)
        for prompt, options, message in (
            ([5] * 30, {"max_new_tokens": 11}, "needs 41 positions, the scheduler has 40"),
            ([5] * 40, {}, "40 tokens and the scheduler 40 positions"),
        ):
            with pytest.raises(ContextLengthError, match=message):
                scheduler.submit(prompt, **options)
        for prompts, options, message in (
            (["a", "b"], {}, "submit takes one prompt"),
            ("a", {"num_beams": 2}, "submit makes one continuation"),
            ("a", {"num_return_sequences": 2, "do_sample": True}, "makes one continuation"),
            ("a", {"top_q": 2}, "top_q"),
        ):
            with pytest.raises(RequestError, match=message):
                scheduler.submit(prompts, **options)  # type: ignore[arg-type]
        exactly = scheduler.submit([5] * 30, max_new_tokens=10, ignore_eos=True)
        assert len(exactly.result(timeout=60).token_ids) == 10
        as_many_as_fit = scheduler.submit([5] * 30, ignore_eos=True)
        assert len(as_many_as_fit.result(timeout=60).token_ids) == 10


def test_the_end(model: Model, steps: Steps) -> None:
    """Leaving the block finishes what was taken; an error, or `cancel`, does not."""
    options: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True}
    with Scheduler(model, max_batch_size=1) as scheduler:
        pending = [scheduler.submit("The", **options) for _ in range(2)]
    assert [len(one.result(timeout=0).token_ids) for one in pending] == [30, 30]
    with pytest.raises(NeoError, match="the scheduler is closed"):
        scheduler.submit("The")
    scheduler.close()
    steps.go_on.clear()

    def interrupted() -> None:
        with Scheduler(model, max_batch_size=1) as other:
            pending.extend(other.submit("The", **options) for _ in range(2))
            wait_for(lambda: other.active == 1)
            threading.Timer(0.1, steps.go_on.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for one in pending[2:]:
        completion = one.result(timeout=0)
        assert completion.finish_reason == "cancelled"
        assert len(completion.token_ids) < 4
    assert model.cache_bytes_in_use == 0
    from_within = Scheduler(model, max_batch_size=1)
    one = from_within.submit("The", on_piece=lambda _: from_within.close(cancel=True), **options)
    assert one.result(timeout=60).finish_reason == "cancelled"
    from_within.close()


def test_a_forgotten_one_finishes_and_is_gone(model: Model, steps: Steps) -> None:
    scheduler = Scheduler(model, max_batch_size=1)
    thread, gone = scheduler._batch._thread, weakref.ref(scheduler)
    steps.go_on.clear()
    pending = scheduler.submit("The", max_new_tokens=5, ignore_eos=True)
    del scheduler
    gc.collect()
    assert gone() is None
    steps.go_on.set()
    assert len(pending.result(timeout=60).token_ids) == 5
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert model.cache_bytes_in_use == 0


def test_the_model_is_closed_under_it(mini_bundle: Path) -> None:
    with neo_runtime.load(mini_bundle, threads=1) as model:
        scheduler = Scheduler(model, max_batch_size=1)
    with pytest.raises(NeoError, match="model is closed"):
        scheduler.submit("The")
    scheduler.close()


def test_a_process_may_end_with_one_running(mini_bundle: Path) -> None:
    code = (
        "import sys, neo_runtime\n"
        "model = neo_runtime.load(sys.argv[1], threads=1)\n"
        "scheduler = neo_runtime.Scheduler(model, max_batch_size=2)\n"
        "pending = scheduler.submit('Once', max_length=500, ignore_eos=True)\n"
        "print(next(pending), flush=True)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(mini_bundle)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.strip()


def test_a_forked_child_makes_its_own(model: Model) -> None:
    with Scheduler(model, max_batch_size=1) as scheduler:

        def child() -> None:
            with pytest.raises(NeoError, match="made in another process"):
                scheduler.submit("The")
            scheduler.close()

        pid = fork(child)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert scheduler.submit("The", max_new_tokens=2).result(timeout=60).text


def test_in_coroutines(model: Model) -> None:
    """`asyncio.wrap_future`: results, a stream, and a task that is cancelled."""

    async def text(scheduler: Scheduler, prompt: str) -> str | None:
        completion = await asyncio.wrap_future(scheduler.submit(prompt, max_new_tokens=20))
        return completion.text

    async def stream(scheduler: Scheduler, prompt: str) -> str:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def put(piece: str | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, piece)

        pending = scheduler.submit(prompt, max_new_tokens=20, on_piece=put)
        pending.add_done_callback(lambda _: put(None))
        pieces = []
        while (piece := await queue.get()) is not None:
            pieces.append(piece)
        return "".join(pieces)

    async def main() -> list[Any]:
        with Scheduler(model, max_batch_size=3) as scheduler:
            long = scheduler.submit("Tom", max_length=500, ignore_eos=True)
            task = asyncio.ensure_future(asyncio.wrap_future(long))
            prompts = ("Once upon a time", "The dog")
            found = await asyncio.gather(
                *(text(scheduler, prompt) for prompt in prompts), stream(scheduler, prompts[0])
            )
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.sleep(0)  # the future is told in the loop's next turn
            assert long.cancelled()
            return list(found)

    first, second, streamed = asyncio.run(main())
    assert first == streamed == model.generate("Once upon a time", max_new_tokens=20).text
    assert second == model.generate("The dog", max_new_tokens=20).text
