"""Measures one case in rounds: each participant once per round, in rotating order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from neo_tools.bench.cases import positions_needed
from neo_tools.bench.participants import NeoWorker, rotated
from neo_tools.worker.engine import context_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from neo_tools.bench.cases import Case, Settings
    from neo_tools.bench.participants import Overhead, Participant
    from neo_tools.worker.engine_client import EngineWorker, MemoryResult

__all__ = ["CaseRecord", "measure_case"]

_WARMUP_DEPTH = 16
_OVERHEAD_STEPS = 24


@dataclass(kw_only=True)
class CaseRecord:
    """The measurements of one participant in one case."""

    rounds: list[list[float]] = field(default_factory=list)
    """[round][step] seconds; a prefill is one step."""
    readings: list[float] = field(default_factory=list)
    """The machine's read bandwidth around each round, bytes per second: the larger of the
    measurements right before and right after it."""
    memory: MemoryResult | None = None
    cache_bytes: int | None = None
    overhead: Overhead | None = None
    device_bytes: int | None = None

    @property
    def seconds(self) -> tuple[float, ...]:
        """Seconds of each round."""
        return tuple(sum(steps) for steps in self.rounds)

    @property
    def steps(self) -> list[float]:
        """Seconds of all steps of all rounds."""
        return [seconds for steps in self.rounds for seconds in steps]


def measure_case(
    case: Case,
    participants: Sequence[Participant],
    settings: Settings,
    vocab_size: int,
    *,
    progress: Callable[[str], None],
    between: Callable[[], float],
) -> dict[str, CaseRecord]:
    """Time `case`; only one participant runs at any moment.

    Args:
        case: the case.
        participants: loaded and stopped participants.
        settings: the run's settings.
        vocab_size: size of the model's vocabulary, for the token ids.
        progress: called with a line about the next step.
        between: called before the first round and after each, when no participant runs; measures
            the machine's read bandwidth.

    Returns:
        Measurements by label.
    """
    found = {participant.label: CaseRecord() for participant in participants}
    ids = context_ids(case.prompt, case.batch, settings.seed, vocab_size)
    for participant in participants:
        with participant.turn() as worker:
            _prepare(case, worker, settings, ids, found[participant.label])
    before = between()
    for index in range(settings.repetitions):
        for participant in rotated(participants, index):
            progress(f"{case.title}: round {index + 1}/{settings.repetitions}, {participant.label}")
            with participant.turn() as worker:
                if case.kind == "prefill":
                    steps = [worker.prefill(ids).seconds]
                else:
                    if index == 0 or not settings.keep_context:
                        worker.context(case.depth, batch=case.batch, seed=settings.seed)
                    steps = worker.decode(case.new_tokens).seconds
            found[participant.label].rounds.append(steps)
        after = between()
        for measured in found.values():
            measured.readings.append(max(before, after))
        before = after
    for participant in participants:
        with participant.turn() as worker:
            _conclude(case, worker, found[participant.label])
    return found


def _prepare(
    case: Case, worker: EngineWorker, settings: Settings, ids: list[list[int]], measured: CaseRecord
) -> None:
    """Reserve the cache, load every graph, and run a warm-up turn that does not count."""
    if isinstance(worker, NeoWorker):
        length = positions_needed(case, settings.repetitions, keep_context=settings.keep_context)
        measured.cache_bytes = worker.reserve(case.batch, length)
        worker.score(1)
    if not settings.warmup:
        return
    if case.kind == "prefill":
        worker.prefill(ids)
    else:
        # On a GPU the whole depth takes little time, and a compiling peer may depend on it.
        depth = case.depth if settings.on_gpu else min(case.depth, _WARMUP_DEPTH)
        worker.context(depth, batch=case.batch, seed=settings.seed)
        worker.decode(min(case.new_tokens, 2))


def _conclude(case: Case, worker: EngineWorker, measured: CaseRecord) -> None:
    """Measure memory while the case's cache still exists, then Python's overhead."""
    measured.memory = worker.memory()
    if isinstance(worker, NeoWorker):
        measured.device_bytes = worker.device_bytes()
    if isinstance(worker, NeoWorker) and case.kind == "decode":
        measured.overhead = worker.overhead(case.batch, _OVERHEAD_STEPS)
