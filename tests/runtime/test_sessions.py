"""What the settings of a session do: threads that wait, operators that are left apart."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import neo_runtime
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers.models import DEMO
from neo_export.exporter import ExportOptions, export_bundle
from neo_runtime.backends.cpu.in_place import InPlaceStore
from neo_runtime.backends.cpu.sessions import session_settings
from neo_runtime.backends.failures import translated
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.errors import BundleError, HostMemoryError, NeoError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

IDLE = """
import resource, sys, time
import neo_runtime

def spent():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

with neo_runtime.load(sys.argv[1], threads=2) as model, model.new_cache(1, 64) as cache:
    for step in (lambda: model.logits([1] * 20), lambda: model.decode(cache, [1])) * 2:
        model.prefill(cache, [[1] * 9])
        step()
        before = spent()
        time.sleep(0.3)
        print(spent() - before)
"""
SPINNING = 0.01
"""Seconds of a processor's time; without a stop onnxruntime's threads spin for 0.03."""


def test_no_thread_spins_for_long(mini_bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IDLE, str(mini_bundle)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    seconds = list(map(float, done.stdout.split()))
    assert min(seconds[::2]) < SPINNING, "behind a prompt or a score"
    assert min(seconds[1::2]) < SPINNING, "behind a step of decode: 2 ms"


@pytest.mark.parametrize(("graph", "inputs"), [("prefill", 1), ("score", 1), ("decode", 2)])
def test_the_bias_stays_apart_from_an_activation_of_many_tokens(
    mini_bundle: Path, tmp_path: Path, graph: str, inputs: int
) -> None:
    """onnxruntime's own fusion would bring back the memory that the exporter left out."""
    bundle = open_bundle(mini_bundle)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    for key, value in session_settings(bundle.manifest, graph).items():
        options.add_session_config_entry(key, value)
    path = bundle.file(bundle.manifest.graphs[graph].file)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    found = {len(node.input) for node in nodes if node.op_type == "FastGelu"}
    assert found == {inputs}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Of the prefill graph: first row, rows, tokens with padding."""
    seen: list[tuple[int, int, int]] = []
    run = InPlaceStore._run_prefill

    def recorded(store: InPlaceStore, row: int, ids: NDArray[np.int64], *rest: object) -> None:
        seen.append((row, ids.shape[0], ids.shape[1]))
        run(store, row, ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(InPlaceStore, "_run_prefill", recorded)
    return seen


@pytest.mark.parametrize(
    ("precision", "expected"), [("fp32", [(0, 1, 300)]), ("int8", [(0, 1, 256), (0, 1, 44)])]
)
def test_quantized_bundles_take_shorter_chunks(
    precision: str, expected: object, calls: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    export_bundle(str(DEMO), tmp_path / "bundle", ExportOptions(precision=precision))
    with neo_runtime.load(tmp_path / "bundle") as model, model.new_cache(1, 300) as cache:
        model.prefill(cache, [np.arange(300)])
    assert calls == expected


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((10, 10, 10), [(0, 3, 10)]),
        ((16, 16, 16), [(0, 2, 16), (2, 1, 16)]),
        ((3, 20, 5, 30, 2), [(0, 1, 3), (1, 1, 20), (2, 1, 5), (3, 1, 30), (4, 1, 2)]),
        ((2, 8, 1, 40, 4, 4), [(0, 3, 8), (3, 1, 32), (3, 1, 8), (4, 2, 4)]),
    ],
)
def test_prompts_go_together_as_far_as_a_chunk_has_room(
    mini_bundle: Path,
    lengths: tuple[int, ...],
    expected: list[tuple[int, int, int]],
    calls: list[tuple[int, int, int]],
) -> None:
    prompts = [np.arange(5, 5 + length) for length in lengths]
    with neo_runtime.load(mini_bundle, threads=1, prefill_chunk=32) as model:
        with model.new_cache(len(prompts), 64) as cache:
            together = model.prefill(cache, prompts).copy()
        assert calls == expected
        for prompt, found in zip(prompts, together, strict=True):
            with model.new_cache(1, 64) as cache:
                np.testing.assert_allclose(model.prefill(cache, [prompt])[0], found, atol=1e-4)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc"),
        RuntimeError("mmap failed: Cannot allocate memory"),
        MemoryError(),
    ],
)
def test_no_memory_is_no_fault_of_the_bundle(
    error: Exception, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    for on_gpu in (False, True):  # the GPU's own memory has other words
        with (
            pytest.raises(HostMemoryError, match=r"memory for activations \(.*; close other"),
            translated(ort, on_gpu=on_gpu),
        ):
            fail()
    monkeypatch.setattr(ort, "InferenceSession", fail)
    with (
        neo_runtime.load(mini_bundle, threads=1) as model,
        pytest.raises(
            NeoError, match=r"too little free memory to load .*onnx \(.*ulimit"
        ) as raised,
    ):
        model.generate("Once", max_new_tokens=3)
    assert not isinstance(raised.value, BundleError)
