"""Freed memory: kept while a call runs, a little of it behind, the rest given back."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import neo_runtime
import numpy as np
import pytest
from helpers.mappings import private_bytes
from neo_runtime.backends.cpu import backend as cpu_backend
from neo_runtime.backends.cpu import heap
from neo_runtime.backends.cpu.backend import OnnxRuntimeBackend

MEGA = 1 << 20
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")

FAULTS = """
import ctypes, resource, sys
from neo_runtime.backends.cpu import heap
if sys.argv[1] == "held":
    heap.hold_within_calls()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [ctypes.c_void_p(library.malloc(8 << 20)) for _ in range(3)]
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    for block in blocks:
        library.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(how: str) -> int:
    command = [sys.executable, "-c", FAULTS, how]
    names = ("GLIBC_TUNABLES", "LD_PRELOAD")
    clean = {k: v for k, v in os.environ.items() if k not in names and not k.startswith("MALLOC_")}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=clean)
    return int(done.stdout)


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@on_glibc
@pytest.mark.skipif(mmap.PAGESIZE != 4096, reason="counts pages of 4 kB")
@pytest.mark.skipif(
    HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(), reason="pages are huge"
)
def test_freed_blocks_are_used_again_within_a_call() -> None:
    """Three activations of 8 MB: 6144 pages of 4 kB."""
    assert new_pages("held") < 100
    assert new_pages("as it is") > 4000


class Process:
    """Stands for the memory of a process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, used: int | None) -> None:
        self.used, self.left, self.calls = used, used, 0
        monkeypatch.setattr(heap, "anonymous_bytes", lambda: self.used)
        monkeypatch.setattr(heap, "give_back", self._give_back)

    def _give_back(self) -> None:
        self.calls += 1
        self.used = self.left


def test_a_little_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(monkeypatch, 100)
    kept = heap.Heap(spare=25)
    for used, calls in ((125, 0), (126, 1), (125, 1), (126, 2)):
        with kept.call():
            process.used = used
        assert process.calls == calls


def test_what_stays_is_counted_from_the_least_that_was_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A long cache was closed, or a result was dropped, before the call."""
    process = Process(monkeypatch, 100)
    kept = heap.Heap(spare=25)
    process.used, process.left = 60, 70
    with kept.call():
        process.used = 90
    assert process.calls == 1
    with kept.call():
        process.used = 95
    assert process.calls == 1


def test_what_another_call_uses_does_not_count_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(monkeypatch, 100)
    kept = heap.Heap(spare=25)
    with kept.call():
        with kept.call():
            process.used = process.left = 300
        assert process.calls == 1
    assert process.calls == 2
    process.used, process.left = 125, 100
    with kept.call():
        pass
    assert process.calls == 2
    with kept.call():
        process.used = 300
    assert process.calls == 3


def test_a_call_that_fails_gives_back(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(monkeypatch, 100)
    kept = heap.Heap(spare=25)

    def fail() -> None:
        with kept.call():
            process.used = 300
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        fail()
    assert process.calls == 1


def test_a_call_whose_end_is_interrupted_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(monkeypatch, 100)
    kept = heap.Heap(spare=25)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt), kept.call():
        patched.setattr(heap, "anonymous_bytes", interrupt)
    process.used = process.left = 300
    with kept.call():
        pass
    with kept.call():
        process.used = 320
    assert process.calls == 1, "no call is running, so 300 are what must be there"


def test_everything_goes_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(monkeypatch, None)
    kept = heap.Heap(spare=25)
    with kept.call():
        pass
    assert process.calls == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_anonymous_bytes() -> None:
    """Mapped by the test: the C library may serve and keep 64 MB from what others have freed."""
    with mmap.mmap(-1, 64 * MEGA, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held.write(b"1" * (64 * MEGA))
        found = heap.anonymous_bytes()
        assert found is not None
        assert abs(found - private_bytes()) < 16 * MEGA  # the kernel counts in batches
    after = heap.anonymous_bytes()
    assert after is not None
    assert found - after > 48 * MEGA


def test_how_much_is_spare(mini_bundle: Path) -> None:
    """Never more than 32 MB, however large a float32 model is."""
    assert cpu_backend._spare(5_262 * MEGA) == 32 * MEGA
    assert cpu_backend._spare(800 * MEGA) == 20 * MEGA
    with neo_runtime.load(mini_bundle, threads=1) as model:
        backend = model._backend
        assert isinstance(backend, OnnxRuntimeBackend)
        size = backend.manifest.files["weights.bin"].size
        assert backend._heap._spare == cpu_backend._spare(size)


@pytest.mark.parametrize("kind", ["mini_bundle", "portable_bundle"])
def test_when_memory_is_held_and_given_back(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a cache in place and an appended one."""
    calls: list[str] = []
    settle = heap.Heap._settle
    for name in ("hold_within_calls", "give_back"):
        monkeypatch.setattr(cpu_backend, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(heap.Heap, "_settle", lambda self: (calls.append("call"), settle(self)))
    model = neo_runtime.load(request.getfixturevalue(kind), threads=1)
    assert calls[0] == "hold_within_calls"
    with model.new_cache(2, 16) as cache:
        model.prefill(cache, [np.arange(3), np.arange(5)])
        model.decode(cache, np.array([1, 2]))  # loads its graph
        calls.clear()
        model.prefill(cache, [np.arange(2), np.arange(4)])
        assert calls == ["call"]
        model.decode(cache, np.array([1, 2]))
        assert calls == ["call"]
    model.close()
    assert calls == ["call", "give_back"]


@on_glibc
def test_the_next_prompt_finds_memory(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as is spare; where nothing is, each prompt gives back what it freed."""
    trims: list[int] = []
    trim = ctypes.CDLL(None).malloc_trim
    monkeypatch.setattr(heap, "give_back", lambda: trims.append(trim(0)))
    ids = np.arange(200)
    counts = []
    for spare in (64 * MEGA, 0):
        with neo_runtime.load(mini_bundle, threads=1) as model:
            backend = model._backend
            assert isinstance(backend, OnnxRuntimeBackend)
            backend._heap = heap.Heap(spare)
            with model.new_cache(1, 256) as cache:
                model.prefill(cache, [ids])
            trims.clear()
            for _ in range(3):
                with model.new_cache(1, 256) as cache:
                    model.prefill(cache, [ids])
            counts.append(len(trims))
    assert counts[0] == 0
    assert counts[1] > 0


@pytest.mark.parametrize("kind", ["mini_bundle", "portable_bundle"])
@pytest.mark.parametrize("batch", [1, 5])
def test_decode_forgets_the_rows_of_tokens(
    batch: int, kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    bundle = request.getfixturevalue(kind)
    with neo_runtime.load(bundle, threads=1) as model, model.new_cache(batch, 64) as cache:
        model.prefill(cache, [np.arange(3)] * batch)
        model.decode(cache, np.full(batch, 7))  # loads its graph
        model.prefill(cache, [np.arange(2)] * batch)  # begins to count anew
        monkeypatch.setattr(cpu_backend, "forget_pages", calls.append)
        for _ in range(40):
            model.decode(cache, np.full(batch, 7))
    graphs = 2  # prefill and decode map the table
    assert len(calls) == graphs * (40 // -(-16 // batch))
