"""Runs a benchmark: opens and loads everything, takes turns, counts and compares."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from neo_runtime.bundle.manifest import WEIGHTS_NAME

from neo_tools.bench.cases import threads_text
from neo_tools.bench.machine import (
    CpuWatch,
    busy_warning,
    cached_weights_warning,
    hidden_warning,
    machine_facts,
    small_buffer_warning,
)
from neo_tools.bench.opening import check_peers_model, open_bundles
from neo_tools.bench.participants import Guard
from neo_tools.bench.results import Limits, ParticipantFacts, Results
from neo_tools.bench.rounds import measure_case
from neo_tools.bench.rows import make_ratios, make_row, with_limits
from neo_tools.bench.starting import bandwidth_participant, make_participants, neo_worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_tools.bench.cases import Settings
    from neo_tools.bench.opening import BundleInfo
    from neo_tools.bench.participants import Participant
    from neo_tools.bench.results import Ratio, Row

__all__ = ["run"]

_FIRST_TOKEN_PROMPT = 16


def run(settings: Settings, progress: Callable[[str], None]) -> Results:
    """Measure everything that `settings` names.

    Args:
        settings: settings with at least one bundle and one case.
        progress: called with a line about each next step.

    Raises:
        NeoError: a bundle, a checkpoint or a peer cannot be used, or a worker failed.
    """
    settings, bundles = open_bundles(settings)
    check_peers_model(settings, bundles[0].manifest)
    machine, watch = machine_facts(), CpuWatch()
    parts: list[_Part] = [
        _run_threads(settings, bundles, threads, progress) for threads in settings.threads
    ]
    warnings = [
        hidden_warning(),
        busy_warning(machine),
        watch.warning(machine.processors),
        small_buffer_warning(machine, settings.probe_bytes),
        None if settings.on_gpu else cached_weights_warning(machine, _step_weights(bundles)),
        *(
            f"{facts.label}: {text}"
            for part in parts
            for facts in part.participants
            for text in facts.details.get("warnings", ())
        ),
    ]
    return Results(
        machine=machine,
        limits=tuple(part.limits for part in parts),
        settings=_plain_settings(settings),
        participants=tuple(facts for part in parts for facts in part.participants),
        rows=tuple(row for part in parts for row in part.rows),
        ratios=tuple(ratio for part in parts for ratio in part.ratios),
        warnings=tuple(dict.fromkeys(w for w in warnings if w is not None)),
    )


def _step_weights(bundles: list[BundleInfo]) -> dict[str, int]:
    """Bytes of weights that a step of one sequence reads, by label."""
    return {info.label: info.weights.total(1) for info in bundles}


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The results with one number of threads."""

    limits: Limits
    participants: list[ParticipantFacts]
    rows: list[Row]
    ratios: list[Ratio]


class _Bandwidth:
    """The machine's read bandwidth, measured repeatedly; bytes per second."""

    def __init__(self, probe: Participant) -> None:
        self._probe = probe
        self.best: dict[str, float] = {}
        """Best rate of each kernel over all measurements."""
        self.readings: list[float] = []
        """The best kernel's rate in each measurement."""

    def measure(self) -> float:
        """Measure now; returns the best kernel's rate."""
        with self._probe.turn() as worker:
            rates: dict[str, float] = worker.rates("read")
        for kernel, rate in rates.items():
            self.best[kernel] = max(rate, self.best.get(kernel, 0.0))
        self.readings.append(max(rates.values()))
        return self.readings[-1]


def _run_threads(
    settings: Settings, bundles: list[BundleInfo], threads: int, progress: Callable[[str], None]
) -> _Part:
    """Run all cases with this number of threads, which is fixed when a worker starts."""
    loading = {info.label: _loading(settings, info, threads, progress) for info in bundles}
    with ExitStack() as stack:
        guard = stack.enter_context(Guard())
        probe = stack.enter_context(bandwidth_participant(settings, threads, guard))
        bandwidth = _Bandwidth(probe)
        progress(f"machine, {threads_text(threads)}: reading and products")
        bandwidth.measure()
        with probe.turn() as worker:
            peak = worker.rates("peak")
        participants = []
        for participant in make_participants(settings, bundles, threads, guard):
            progress(f"load {participant.label}")
            participants.append(stack.enter_context(participant))
            with participant.turn() as worker:
                participant.loaded = worker.load()
        rows: list[Row] = []
        ratios: list[Ratio] = []
        for case in settings.cases:
            if case.threads != threads:
                continue
            measured = measure_case(
                case,
                participants,
                settings,
                bundles[0].manifest.model.vocab_size,
                progress=progress,
                between=bandwidth.measure,
            )
            rows += [
                make_row(case, participant, measured[participant.label], bundles)
                for participant in participants
            ]
            ratios += make_ratios(case, participants, measured)
    rows, best = with_limits(rows, bandwidth.best)
    facts = [_facts(p, settings, bundles, threads, loading.get(p.label)) for p in participants]
    limits = Limits(
        threads=threads,
        read=best,
        rounds=tuple(bandwidth.readings),
        peak=peak,
        buffer_bytes=settings.probe_bytes,
    )
    return _Part(limits=limits, participants=facts, rows=rows, ratios=ratios)


@dataclass(frozen=True, kw_only=True)
class _Loading:
    """Seconds: see the fields of the same names in `ParticipantFacts`."""

    first_load_seconds: float
    first_token_seconds: float
    first_token_prefill_seconds: float


def _loading(
    settings: Settings, info: BundleInfo, threads: int, progress: Callable[[str], None]
) -> _Loading:
    """Measure loading in two new processes, one after the other."""
    progress(f"load {info.label} for the first time")
    with neo_worker(settings, info, threads) as worker:
        first_load = worker.load().details["load_seconds"]
        worker.score(1)  # so that everything that a first use stores for later ones exists
    progress(f"load {info.label} for a first token")
    with neo_worker(settings, info, threads) as worker:
        first, prefill = worker.first_token(_FIRST_TOKEN_PROMPT)
    return _Loading(
        first_load_seconds=first_load,
        first_token_seconds=first,
        first_token_prefill_seconds=prefill,
    )


def _facts(
    participant: Participant,
    settings: Settings,
    bundles: list[BundleInfo],
    threads: int,
    loading: _Loading | None,
) -> ParticipantFacts:
    loaded = participant.loaded
    assert loaded is not None
    shared: dict[str, Any] = {
        "label": participant.label,
        "precision": participant.precision,
        "threads": threads,
        "versions": loaded.versions,
        "details": loaded.details,
    }
    if participant.kind == "peer":
        source = str(settings.model)
        return ParticipantFacts(kind="peer", source=source, load_seconds=loaded.seconds, **shared)
    [info] = [info for info in bundles if info.label == participant.label]
    assert loading is not None
    return ParticipantFacts(
        kind="bundle",
        source=str(info.path),
        load_seconds=loaded.details["load_seconds"],
        import_seconds=loaded.details["import_seconds"],
        **asdict(loading),
        prepacked_bytes=loaded.details["prepacked_bytes"],
        weights_bytes=info.manifest.files[WEIGHTS_NAME].size,
        **shared,
    )


def _plain_settings(settings: Settings) -> dict[str, Any]:
    """The settings for a report, without the cases, which its rows show."""
    found = asdict(settings)
    del found["cases"]
    found["bundles"] = [str(path) for path in settings.bundles]
    found["peers"] = [choice.label for choice in settings.peers]
    for name in ("model", "peers_root"):
        found[name] = None if found[name] is None else str(found[name])
    return found
