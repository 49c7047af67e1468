"""Memory that a process may still have, and how many sequences are computed together for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import neo_runtime
import pytest
from helpers.control_groups import PLACE_V1, V1, V2, tree
from neo_runtime import Scheduler
from neo_runtime.generation.fitting import fitting_batch, memory_for_caches
from neo_runtime.machine.memory import available_memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from neo_runtime.model import Model

MACHINE = "MemTotal:       24000000 kB\nMemFree: 1 kB\nMemAvailable:   20000000 kB\nHugePages: 0\n"


def rooted(root: Path, meminfo: str = MACHINE) -> Path:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/meminfo").write_text(meminfo)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 20_480_000_000),
        ({"memory.max": "max\n", "memory.current": "5\n"}, 20_480_000_000),
        # Without memory.stat all that is used counts; with it, caches of files do not.
        ({"memory.max": "1000\n", "memory.current": "400\n"}, 600),
        ({"memory.max": "1000", "memory.current": "400", "memory.stat": "anon 9\nfile 300\n"}, 900),
        ({"memory.max": "1000", "memory.current": "1400"}, 0),
        ({"memory.max": "1000"}, 20_480_000_000),
        ({"memory.max": "what", "memory.current": "ever"}, 20_480_000_000),
        # The group around it is fuller.
        (
            {
                "memory.max": "1000",
                "memory.current": "900",
                "inner/memory.max": "500",
                "inner/memory.current": "100",
            },
            100,
        ),
    ],
)
def test_version_2(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    place = "/inner" if any(name.startswith("inner") for name in files) else "/"
    root = tree(tmp_path, f"0::{place}\n", V2.format(top="/"), files)
    assert available_memory(rooted(root)) == expected


@pytest.mark.parametrize(
    ("limit", "expected"), [("5000\n", 4700), (f"{2**63 - 4096}\n", 20_480_000_000)]
)
def test_version_1(tmp_path: Path, limit: str, expected: int) -> None:
    files = {
        "memory/other/memory.limit_in_bytes": limit,
        "memory/other/memory.usage_in_bytes": "1000\n",
        "memory/other/memory.stat": "cache 1\nrss 2\ntotal_cache 700\n",
    }
    root = tree(tmp_path, PLACE_V1.format(place="/"), V1.format(top="/"), files)
    assert available_memory(rooted(root)) == expected


def test_where_nothing_is_said(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    assert available_memory(rooted(tmp_path, "MemTotal: 5 kB\nodd\n")) is None


def test_the_machine_says_something() -> None:
    assert (available_memory() or 0) > 2**20


@pytest.fixture
def model(mini_bundle: Path) -> Iterator[Model]:
    with neo_runtime.load(mini_bundle, threads=1) as loaded:
        yield loaded


def test_batches_fit_into_the_container(
    model: Model, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step, not by the kernel in the middle of one."""
    one = model.cache_bytes(1, 512)
    weights = model.manifest.files["weights.bin"].size

    def left(caches: float) -> None:
        free = int((caches * one + weights) * 8 / 7) + 1  # an eighth is for activations
        monkeypatch.setattr("neo_runtime.generation.fitting.available_memory", lambda: free)

    left(5)
    assert 5 * one <= (memory_for_caches(model) or 0) <= 5 * one + 8
    assert fitting_batch(model, 16, 512) == 4
    assert fitting_batch(model, 16, 512, each=2) == 2
    assert fitting_batch(model, 16, 512, spare=2) == 2
    with Scheduler(model) as scheduler:
        assert scheduler.max_batch_size == 4
    with Scheduler(model, max_batch_size=6) as scheduler:
        assert scheduler.max_batch_size == 6, "who says how many knows"
    left(0.5)
    assert fitting_batch(model, 16, 512) == 1
    left(100)
    assert fitting_batch(model, 16, 512) == 16
    with neo_runtime.load(mini_bundle, threads=1, max_cache_bytes=3 * one) as limited:
        assert fitting_batch(limited, 16, 512) == 2
    monkeypatch.setattr("neo_runtime.generation.fitting.available_memory", lambda: None)
    assert fitting_batch(model, 16, 512) == 16
    monkeypatch.setattr(model, "backend", "cuda")
    left(1)
    assert memory_for_caches(model) is None
    assert fitting_batch(model, 16, 512) == 16


def test_one_prompt_asks_the_system_for_nothing(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is computed alone whatever there is; to ask takes half a millisecond."""
    asked: list[bool] = []

    def note() -> None:
        asked.append(True)

    monkeypatch.setattr("neo_runtime.generation.fitting.available_memory", note)
    model.generate("a", max_new_tokens=1)
    assert asked == []
    model.generate(["a", "b"], max_new_tokens=1)
    assert asked == [True]
