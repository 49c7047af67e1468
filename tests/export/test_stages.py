"""Progress on stderr, on a terminal and in a log."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys

import pytest
from neo_export.reports import stages
from neo_export.reports.stages import StageLine


class Stream(io.StringIO):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def stream(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> Stream:
    made = Stream(terminal=terminal)
    monkeypatch.setattr(sys, "stderr", made)
    return made


def test_a_log_has_a_line_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = stream(monkeypatch, terminal=False)
    with StageLine("neo-x") as bar:
        for stage, total in (("reading", 0), ("weights", 300), ("checking", 0)):
            for done in range(total + 1):
                bar.show(stage, done, total)
    assert seen.getvalue().splitlines() == [
        "neo-x: reading",
        "neo-x: weights, 100 %",
        "neo-x: checking",
    ]


def test_a_log_hears_of_a_stage_that_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds a step here: a line at first after half a minute, then each half minute."""
    seen = stream(monkeypatch, terminal=False)
    now = [0.0]
    monkeypatch.setattr(stages.time, "monotonic", lambda: now[0])
    with StageLine("neo-x") as bar:
        for done in range(9):
            bar.show("weights", done, 8)
            now[0] += 10
    assert seen.getvalue().splitlines() == [
        "neo-x: weights, 37 %",
        "neo-x: weights, 75 %",
        "neo-x: weights, 100 %",
    ]


def test_a_terminal_has_one_line_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each percent once; the line is closed before the next stage, and when an error leaves."""
    seen = stream(monkeypatch, terminal=True)
    with contextlib.suppress(ValueError), StageLine("neo-x") as bar:
        for done in range(401):
            bar.show("weights", done, 400)
        bar.show("checking", 1, 2)
        raise ValueError
    first, second = seen.getvalue().removesuffix("\n").split("\n")
    assert first.count("\r") == 101
    assert first.endswith("\rneo-x: weights, 100 %\033[K")
    assert second == "\rneo-x: checking, 50 %\033[K"
    assert seen.getvalue().endswith("\n")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_count_through_all_stages(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    """A log has each stage as it begins, which no stage but the last ends at 100 %."""
    seen = stream(monkeypatch, terminal=terminal)
    clock = itertools.count(step=2)
    monkeypatch.setattr(stages.time, "monotonic", lambda: float(next(clock)))
    with StageLine("neo-x", pace="rows/s") as bar:
        bar.show("reading", 0, 0)
        for layer in range(4):
            bar.show(f"layer {layer}", 100 * layer + 50, 400)
            bar.show(f"layer {layer}", 100 * layer + 100, 400)
    lines = seen.getvalue().splitlines()
    if terminal:
        assert "layer 1, 37 %, 25 rows/s, 10 s left\033[K" in seen.getvalue()
        assert "layer 1, 50 %, 25 rows/s, 8 s left\033[K" in seen.getvalue()
    else:
        assert lines == [
            "neo-x: reading",
            "neo-x: layer 0, 12 %",
            "neo-x: layer 1, 37 %, 25 rows/s, 10 s left",
            "neo-x: layer 2, 62 %, 25 rows/s, 6 s left",
            "neo-x: layer 3, 87 %, 25 rows/s, 2 s left",
            "neo-x: layer 3, 100 %, 25 rows/s, 0 s left",
        ]
