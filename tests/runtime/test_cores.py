"""How many processors are counted, where the system says less than Linux does."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from neo_runtime.cores import physical_cores, usable_processors

if TYPE_CHECKING:
    import pytest


def test_at_least_one_of_those_that_may_be_used() -> None:
    assert 1 <= physical_cores() <= usable_processors() <= (os.cpu_count() or 1)


def test_systems_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert (usable_processors(), physical_cores()) == (6, 6)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_processors() == 1
