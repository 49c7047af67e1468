"""`neo-diff --backend cuda` over host memory and the CPU provider: everything but the GPU itself.

Both backends run the same graphs here, so what is found must be the same; what differs is the way:
device memory, slots, calls of the score graph in pieces, places fetched from the device.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from helpers import faults
from helpers.fake_engine import GPU, PLATFORM, FakeTensorRT, installed, with_plan
from helpers.host_device import HostDevice
from helpers.locating import locate
from helpers.models import DEMO, make_checkpoint, random_ids
from neo_export.comparison.probed import probed_model, probed_values
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.targets import Quantization
from neo_runtime.backends import choice
from neo_runtime.backends.cuda.backend import CudaBackend
from neo_runtime.backends.cuda.sessions import CudaSessions
from neo_runtime.backends.tensorrt.backend import TensorRTBackend
from neo_runtime.bundle.folder import open_bundle
from neo_tools.diff.cached_path import segments_of, trace_cached_path
from neo_tools.diff.cli import main
from neo_tools.diff.probed_backend import ProbedBackend
from neo_tools.diff.probed_cuda import ProbedCudaBackend
from neo_tools.diff.references import open_reference
from neo_tools.diff.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from neo_export.comparison.trace import Trace

FEW = ["--tokens", "1024", "--decode-positions", "16", "--threads", "1", "--continuations", "1"]
SHOWN = ("query", "key", "value", "attended", "attention", "mlp", "residual")


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, HostDevice]]:
    """Host memory in place of every GPU; number and memory of what was opened so far."""
    opened: list[tuple[int, HostDevice]] = []

    def device(index: int) -> HostDevice:
        opened.append((index, HostDevice()))
        return opened[-1][1]

    def backend(bundle: Any, options: Any) -> CudaBackend:
        found = CudaBackend(bundle, device(options.device))
        found.described = f"NVIDIA Test (device {options.device})"
        return found

    monkeypatch.setattr("neo_runtime.backends.device.nvidia.CudaDevice", device)
    monkeypatch.setitem(choice._OPENERS, "cuda", backend)
    return opened


def ran(results: dict[str, Any], subject: str = "bundle") -> tuple[str, str]:
    return results[subject]["backend"], results[subject]["runs_on"]


def result(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json", "--quiet"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_same_is_found(
    cuda_bundle: Path, devices: list[tuple[int, HostDevice]], capsys: pytest.CaptureFixture[str]
) -> None:
    found, expected = (
        result(capsys, cuda_bundle, "--reference", DEMO, *FEW, "--backend", backend, "--device", 3)
        for backend in ("cuda", "cpu")
    )
    assert ran(found) == ("cuda", "NVIDIA Test (device 3)")
    assert ran(expected) == ("cpu", "CPU")
    # Logits twice, then places of score, then those of prefill and decode.
    assert [index for index, _ in devices] == [3] * 4
    assert all(device.closed for _, device in devices)
    for key in ("localized_tokens", "first_fault"):
        assert found[key] == expected[key]
    bundle, other = (results["perplexity"]["bundle"] for results in (found, expected))
    assert bundle == pytest.approx(other, rel=1e-3)

    def places(results: dict[str, Any]) -> set[tuple[Any, ...]]:
        keys = ("graph", "layer", "place", "region", "positions")
        return {tuple(place[key] for key in keys) for place in results["places"]}

    assert places(found) == places(expected)
    for mine, other in zip(found["places"], expected["places"], strict=True):
        # The order of some sums differs: calls are cut otherwise.
        assert mine["local_median"] == pytest.approx(other["local_median"], rel=0.5, abs=1e-4)


def test_a_bundle_as_the_reference(
    cuda_bundle: Path,
    mini_bundle: Path,
    devices: list[tuple[int, HostDevice]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It runs on what it was made for, on the GPU that was named, its places too."""
    # Limits are those of the bundle, here float32's.
    arguments = (mini_bundle, "--reference", cuda_bundle, *FEW, "--device", 2, "--report-only")
    found = result(capsys, *arguments)
    assert ran(found) == ("cpu", "CPU")
    assert ran(found, "reference") == ("cuda", "NVIDIA Test (device 2)")
    assert [index for index, _ in devices] == [2, 2]
    assert found["places"]
    devices.clear()
    found = result(capsys, *arguments, "--localize-tokens", "0")
    assert [index for index, _ in devices] == [2]
    assert not found["places"]


def test_a_reference_that_shows_no_places(
    cuda_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What was not compared is not right: it is said, and not counted."""
    reason = "for a reason"
    monkeypatch.setattr("neo_tools.diff.references.why_not_shown", lambda *_: reason)
    few = ["--tokens", "64", "--continuations", "0", "--quiet", "--backend", "cpu"]
    assert not main([str(cuda_bundle), "--reference", str(cuda_bundle), *few])
    out, err = capsys.readouterr()
    assert f"places are not compared, the reference shows none: {reason}" in err
    assert "every step" not in out


def test_what_auto_took_is_said_once(
    cuda_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The bundle is loaded twice."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    few = ["--tokens", "64", "--localize-tokens", "0", "--continuations", "0", "--quiet"]
    assert not main([str(cuda_bundle), "--reference", str(DEMO), *few])
    said = [record for record in caplog.records if "backend cpu" in record.getMessage()]
    assert len(said) == 1


def test_the_report_says_what_ran_it(
    cuda_bundle: Path, devices: list[tuple[int, HostDevice]], capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--tokens", "64", "--localize-tokens", "0", "--continuations", "0"]
    assert not main([str(cuda_bundle), "--reference", str(DEMO), *few, "--backend", "cuda"])
    assert "target cuda), on NVIDIA Test (device 0)\n" in capsys.readouterr().out


def test_every_value_is_the_one_of_the_cpu(cuda_bundle: Path) -> None:
    """Of score in one call, and of prefill and decode through one cache, bit for bit."""
    ids = random_ids(faults.CONFIG, 100)
    segments = segments_of(len(ids), [(64, 70)], 64)
    found: list[list[Trace]] = []
    for backend in (
        ProbedBackend(open_bundle(cuda_bundle), threads=1),
        ProbedCudaBackend(open_bundle(cuda_bundle), HostDevice()),
    ):
        traces = [backend.score_trace(ids)]
        parts, checks = trace_cached_path(backend, ids, segments)
        found.append([*traces, *parts])
        assert checks
        for check in checks:
            assert len(check.errors) == 2 * 4
            assert all(np.nanmax(errors) == 0 for errors in check.errors.values())
        backend.close()
    for mine, other in zip(*found, strict=True):
        assert (mine.graph, mine.start, mine.length) == (other.graph, other.start, other.length)
        assert mine.selected == other.selected
        for layer in range(4):
            for place in SHOWN:
                np.testing.assert_array_equal(mine.get(layer, place), other.get(layer, place))
        np.testing.assert_array_equal(mine.logits, other.logits)
        np.testing.assert_array_equal(mine.logits_at, other.logits_at)


def test_nothing_is_captured_or_replayed(
    cuda_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is shown leaves the device at every step, which a CUDA graph would not repeat."""
    replayed: list[int] = []
    run = CudaSessions.run

    def watched(self: CudaSessions, graph: str, binding: Any, graph_id: int = -1) -> None:
        replayed.append(graph_id)
        run(self, graph, binding, graph_id)

    monkeypatch.setattr(CudaSessions, "run", watched)
    device = HostDevice()
    backend = ProbedCudaBackend(open_bundle(cuda_bundle), device)
    trace_cached_path(backend, random_ids(faults.CONFIG, 20), segments_of(20, [(10, 13)], 10))
    backend.close()
    assert device.captured == [False, False]
    assert len(replayed) == 5
    assert set(replayed) == {-1}


def test_score_in_several_calls(cuda_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(faults.CONFIG, 100)
    with_one, with_many = (
        ProbedCudaBackend(open_bundle(cuda_bundle), HostDevice()) for _ in range(2)
    )
    one = with_one.score_trace(ids)
    monkeypatch.setattr("neo_runtime.backends.cuda.backend.CudaBackend.scored_at_once", 17)
    many = with_many.score_trace(ids)
    assert (many.start, many.length) == (0, 100)
    for place in SHOWN:
        np.testing.assert_allclose(many.get(2, place), one.get(2, place), rtol=0, atol=2e-2)
    with_one.close()
    with_many.close()


FAULTS = {
    "window": faults.other_window(9, 8, 1),
    "scaled": faults.scaled(2, faults.CONFIG.head_dim),
    "late cache": faults.late_cache(0, "key", "prefill"),
    "k_proj": faults.wrong_matrix(1, "k_proj", 3),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("faults") / "checkpoint", faults.CONFIG)


@pytest.mark.parametrize("precision", ["fp16", "int4"])
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(
    name: str,
    precision: str,
    checkpoint: Path,
    devices: list[tuple[int, HostDevice]],
    tmp_path: Path,
) -> None:
    fault, bundle = FAULTS[name], tmp_path / "bundle"
    options = ExportOptions(
        target="cuda", precision=precision, quantization=Quantization(block_size=16)
    )
    if fault.graph is None:
        spoiled = faults.spoiled_checkpoint(checkpoint, tmp_path / "checkpoint", fault)
        export_bundle(str(spoiled), bundle, options)
    else:
        export_bundle(str(checkpoint), tmp_path / "clean", options)
        faults.spoiled_bundle(tmp_path / "clean", bundle, fault)
    settings = Settings(
        bundle=bundle, reference="", backend="cuda", decode_positions=16, prefill_chunk=7, threads=1
    )
    texts = [random_ids(faults.CONFIG, faults.CONFIG.max_position_embeddings)]
    with open_reference(str(checkpoint), threads=1) as reference:
        first = locate(open_bundle(bundle), reference, texts, settings)[0]
    assert devices
    assert first.layer == fault.layer
    assert first.place in fault.places
    assert first.region in fault.regions


def test_slots_are_unlike_what_a_text_leaves(cuda_bundle: Path) -> None:
    """Memory of an earlier text is used again, and would hold the right keys of the same one."""
    backend = ProbedCudaBackend(open_bundle(cuda_bundle), HostDevice())
    for _ in range(2):
        store = backend.open_cache(1, 40)
        store.spoil()
        assert all((array == 1000).all() for array in store.contents())
        ids = random_ids(faults.CONFIG, 20)
        store.prefill([ids], 64)
        key = store.contents()[0]
        assert key.dtype == np.float16
        assert (np.abs(key[:, :, :20]) < 100).all()
        assert (key[:, :, 20:] == 1000).all()
        store.close()
    backend.close()


def test_bfloat16_is_shown_as_float32(tmp_path: Path) -> None:
    """numpy has no bfloat16; no engine here runs it, so this looks at the graph."""
    export_bundle(str(DEMO), tmp_path / "bundle", ExportOptions(target="cuda", precision="bf16"))
    manifest = open_bundle(tmp_path / "bundle").manifest
    model = onnx.load_from_string(probed_model(tmp_path / "bundle", manifest, "decode"))
    kinds = {output.name: output.type.tensor_type.elem_type for output in model.graph.output}
    shown = probed_values(manifest)
    assert len(shown) > 20
    assert {kinds[name] for name in shown} == {onnx.TensorProto.FLOAT}
    made = {name: node for node in model.graph.node for name in node.output}
    assert {made[name].op_type for name in shown} == {"Cast"}
    assert len(made) == sum(len(node.output) for node in model.graph.node)
    assert manifest.cache.dtype == "bfloat16"


def test_a_bfloat16_cache_is_read_and_spoiled(tmp_path: Path) -> None:
    export_bundle(str(DEMO), tmp_path / "bundle", ExportOptions(target="cuda", precision="bf16"))
    device = HostDevice()
    backend = CudaBackend(open_bundle(tmp_path / "bundle"), device)
    store = backend.open_cache(2, 16)
    store.spoil()
    contents = store.contents()
    assert len(contents) == 8
    assert {array.dtype for array in contents} == {np.dtype(np.float32)}
    assert all((array == 1000).all() for array in contents)
    address, _, shape = next(iter(store.slot.cache.values()))
    device.upload(address, np.full(shape, 0xBF80, dtype=np.uint16))
    assert (store.contents()[0] == -1.0).all()
    assert len(store.contents()[0]) == 2
    store.reorder(np.array([1]))
    assert len(store.contents()[0]) == 1
    store.close()
    backend.close()


def test_a_plan(
    tensorrt_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Logits through the engine, with its cache and its captured step; places of its graph."""
    bundle = with_plan(tensorrt_bundle, tmp_path / "bundle")
    fake = FakeTensorRT(bundle)
    module = "neo_runtime.backends.tensorrt.plan.installed_modules"
    monkeypatch.setattr(module, installed(fake))

    def backend(bundle: Any, options: Any) -> TensorRTBackend:
        found = TensorRTBackend(bundle, HostDevice(), GPU, PLATFORM)
        found.described = f"test.plan on {GPU.name}"
        return found

    monkeypatch.setitem(choice._OPENERS, "tensorrt", backend)
    few = ["--tokens", "300", "--context", "150", *FEW[2:]]
    found = result(capsys, bundle, "--reference", DEMO, *few, "--backend", "tensorrt")
    assert ran(found) == ("tensorrt", f"test.plan on {GPU.name}")
    assert {graph["graph"] for graph in found["graphs"]} == {"score", "prefill", "decode", "batch"}
    assert {place["graph"] for place in found["places"]} == {"score"}
    assert found["first_fault"] is None
    [warning] = [warning for warning in found["warnings"] if "places" in warning]
    assert warning.startswith("a plan shows no places: what is said of them is of its graph")
    assert sum(context.runs for context in fake.engine.contexts) > 0


def test_a_bfloat16_plan_that_cannot_be_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does its graph run on the CPU."""
    options = ExportOptions(target="tensorrt", precision="bf16")
    export_bundle(str(DEMO), tmp_path / "bundle", options)
    assert main([str(tmp_path / "bundle"), "--reference", str(DEMO)]) == 2
    assert "has no CPU kernels" in capsys.readouterr().err


def test_a_bundle_for_another_backend(
    mini_bundle: Path, tensorrt_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for bundle, backend in ((mini_bundle, "tensorrt"), (tensorrt_bundle, "cuda")):
        assert main([str(bundle), "--reference", str(DEMO), "--backend", backend]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert "was exported for" in err
        assert "export with --target" in err
