"""How many processors are counted, where the system says less than Linux does."""

from __future__ import annotations

import os

import pytest
from neo_runtime.errors import RequestError
from neo_runtime.machine.cores import chosen_threads, physical_cores, usable_processors


def test_at_least_one_of_those_that_may_be_used() -> None:
    assert 1 <= physical_cores() <= usable_processors() <= (os.cpu_count() or 1)


def test_more_threads_than_processors(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("neo_runtime.machine.cores.usable_processors", lambda: 2)
    assert chosen_threads(None) == physical_cores()
    assert chosen_threads(2) == 2
    assert not caplog.records
    assert chosen_threads(32) == 32
    assert "32 threads on 2 processors" in caplog.text
    with pytest.raises(RequestError, match=r"threads is 33, .* 2 processors; expected at most 32"):
        chosen_threads(33)


def test_systems_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert (usable_processors(), physical_cores()) == (6, 6)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_processors() == 1
