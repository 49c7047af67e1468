"""Texts through a cache: each finds it as if nothing had been there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
from neo_export.comparison.explanations import _rows
from neo_export.comparison.faults import Fault
from neo_runtime.backends.cpu.in_place import InPlaceStore
from neo_runtime.bundle.folder import open_bundle
from neo_tools.diff.cached_path import segments_of, trace_cached_path
from neo_tools.diff.probed_backend import ProbedBackend
from neo_tools.diff.shipped import stepwise_logits

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_nothing_of_one_text_is_left_for_the_next(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right keys of an earlier run of the same text would hide a slot that is not written."""
    ids, seen = np.arange(20), []
    prefill = InPlaceStore.prefill

    def watched(store: InPlaceStore, *arguments: Any) -> Any:
        seen.append(all(np.isnan(array).all() for array in store.contents()))
        return prefill(store, *arguments)

    monkeypatch.setattr(InPlaceStore, "prefill", watched)
    segments = segments_of(len(ids), (), 32)
    with neo_runtime.load(mini_bundle, threads=1) as model:
        for _ in range(2):
            stepwise_logits(model, ids, segments)
    backend = ProbedBackend(open_bundle(mini_bundle), threads=1)
    for _ in range(2):
        trace_cached_path(backend, ids, segments)
    backend.close()
    assert seen == [True] * 4


def test_prefill_shows_the_last_layer_at_the_end_of_each_call(mini_bundle: Path) -> None:
    ids = np.arange(40)
    backend = ProbedBackend(open_bundle(mini_bundle), threads=1)
    traces, _ = trace_cached_path(backend, ids, segments_of(len(ids), [(20, 24)], 16))
    backend.close()
    last = backend.manifest.model.num_layers - 1
    assert [(trace.graph, trace.start, trace.length) for trace in traces] == [
        ("prefill", 0, 16),
        ("prefill", 16, 4),
        ("decode", 20, 4),
        ("prefill", 24, 16),
    ]
    for trace in traces:
        every = list(range(trace.length))
        some = every if trace.graph == "decode" else every[-1:]
        for layer, place in (
            (last, "query"),
            (last, "attended"),
            (last, "attention"),
            (last, "mlp"),
            (last, "residual"),
            (None, "final_norm"),
        ):
            assert trace.rows(layer, place).tolist() == some
            assert trace.get(layer, place)[some].any(axis=1).all()
        assert trace.rows(last, "key").tolist() == every
        assert trace.rows(last - 1, "attended").tolist() == every
        assert trace.rows(last - 1, "residual").tolist() == every


def test_what_would_explain_a_fault_is_tried_where_the_graph_computed(mini_bundle: Path) -> None:
    backend = ProbedBackend(open_bundle(mini_bundle), threads=1)
    [trace], _ = trace_cached_path(backend, np.arange(40), segments_of(40, (), 40))
    backend.close()
    spec = backend.manifest.model
    every = ("below", "at", "past")

    def rows(layer: int, place: str, regions: tuple[str, ...] = every) -> list[int]:
        fault = Fault(layer, place, "everywhere", regions, ("prefill",), error=1.0, limit=0.1)
        return _rows(fault, trace, spec.window_size).tolist()

    assert rows(spec.num_layers - 1, "mlp") == [39]
    assert rows(spec.num_layers - 1, "mlp", ("past",)) == []
    assert rows(spec.num_layers - 2, "mlp") == list(range(40))
