"""Freed memory: kept while a call runs, a little of it behind, the rest given back."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from typing import TYPE_CHECKING

import neo_runtime
import numpy as np
import pytest
from helpers.mappings import private_bytes
from neo_runtime.backends import heap
from neo_runtime.backends.onnxruntime import OnnxRuntimeBackend

if TYPE_CHECKING:
    from pathlib import Path

MEGA = 1 << 20
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")

FAULTS = """
import ctypes, resource, sys
from neo_runtime.backends import heap
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
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@on_glibc
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
        process.used = used
        kept.after_call()
        assert process.calls == calls


def test_what_stays_is_counted_from_the_least_that_was_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = Process(monkeypatch, 100)
    kept = heap.Heap(spare=25)
    process.used = 60  # a long cache was closed
    kept.after_call()
    process.used, process.left = 90, 70
    kept.after_call()
    assert process.calls == 1
    process.used = 95
    kept.after_call()
    assert process.calls == 1


def test_everything_goes_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(monkeypatch, None)
    kept = heap.Heap(spare=25)
    kept.after_call()
    assert process.calls == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_anonymous_bytes() -> None:
    held = np.ones(64 * MEGA, np.uint8)
    found = heap.anonymous_bytes()
    assert found is not None
    assert abs(found - private_bytes()) < 4 * MEGA
    del held
    after = heap.anonymous_bytes()
    assert after is not None
    assert found - after > 60 * MEGA


@on_glibc
def test_the_next_prompt_finds_memory(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as much as is spare; with nothing to spare there is less in use behind each prompt."""
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


@pytest.mark.parametrize("batch", [1, 5])
def test_decode_forgets_the_rows_of_tokens(
    batch: int, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    with neo_runtime.load(mini_bundle, threads=1) as model:
        with model.new_cache(batch, 64) as cache:
            model.prefill(cache, [np.arange(3)] * batch)
            monkeypatch.setattr(
                OnnxRuntimeBackend, "forget_token_rows", lambda _: calls.append(1)
            )
            for _ in range(40):
                model.decode(cache, np.full(batch, 7))
    assert len(calls) == 40 // -(-16 // batch)
