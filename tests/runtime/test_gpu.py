"""What is said where a GPU cannot be used: the CUDA runtime and onnxruntime are stood in for."""

from __future__ import annotations

import importlib
import logging
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from enum import IntEnum
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import neo_runtime
import pytest
from helpers.host_device import HostDevice
from neo_runtime.backends import choice
from neo_runtime.backends.device import locks as device_locks
from neo_runtime.backends.device.nvidia import CudaDevice, checked
from neo_runtime.backends.failures import translated
from neo_runtime.errors import (
    BundleDamagedError,
    BundleUnsupportedError,
    DependencyError,
    DeviceError,
    DeviceMemoryError,
    EngineError,
    HostMemoryError,
    NeoError,
    RequestError,
)
from neo_runtime.machine.gpu import GpuFacts, require_cuda_provider, require_gpu

if TYPE_CHECKING:
    from pathlib import Path


class Error(IntEnum):
    """Names and numbers of CUDA's own."""

    cudaSuccess = 0  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorInsufficientDriver = 35  # noqa: N815
    cudaErrorNoDevice = 100  # noqa: N815
    cudaErrorUnknown = 999  # noqa: N815


@dataclass
class FakeCuda:
    """The part of `cuda.bindings.runtime` that looks for GPUs."""

    driver: int = 13010
    runtime: int = 13050
    count: tuple[Error, int | None] = (Error.cudaSuccess, 2)

    def cudaDriverGetVersion(self) -> tuple[Error, int]:  # noqa: N802
        return Error.cudaSuccess, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[Error, int]:  # noqa: N802
        return Error.cudaSuccess, self.runtime

    def cudaGetDeviceCount(self) -> tuple[Error, int | None]:  # noqa: N802
        return self.count

    def cudaGetDeviceProperties(self, index: int) -> tuple[Error, Any]:  # noqa: N802
        facts = SimpleNamespace(name=b"NVIDIA Test\0", major=9, minor=0, totalGlobalMem=80 << 30)
        return Error.cudaSuccess, facts


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr("neo_runtime.machine.gpu.cuda_runtime", lambda: fake)
    return fake


def test_a_gpu(cuda: FakeCuda) -> None:
    assert require_gpu(1) == GpuFacts(
        index=1,
        name="NVIDIA Test",
        compute_capability="9.0",
        memory_bytes=80 << 30,
        driver_cuda=(13, 1),
    )


def test_no_driver(cuda: FakeCuda) -> None:
    cuda.driver, cuda.count = 0, (Error.cudaErrorInsufficientDriver, None)
    with pytest.raises(
        DeviceError, match=r"no NVIDIA driver.*install the driver, or start .*--gpus all"
    ):
        require_gpu()


def test_too_old_a_driver(cuda: FakeCuda) -> None:
    cuda.driver, cuda.count = 12040, (Error.cudaErrorInsufficientDriver, None)
    with pytest.raises(DeviceError, match=r"CUDA up to 12\.4.*needs 13\.5; update the driver"):
        require_gpu()


@pytest.mark.parametrize("count", [(Error.cudaErrorNoDevice, None), (Error.cudaSuccess, 0)])
def test_no_gpu(
    count: tuple[Error, int | None], cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.count = count
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(DeviceError, match=r"no usable NVIDIA GPU.*VISIBLE_DEVICES is '7'"):
        require_gpu()


def test_no_such_gpu(cuda: FakeCuda) -> None:
    with pytest.raises(DeviceError, match=r"device is 2, but .* 2 GPUs, expected 0 to 1"):
        require_gpu(2)


def test_neither_a_driver_nor_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package would help."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setattr("neo_runtime.machine.gpu._DRIVER_LIBRARY", "libno-such-driver.so.1")
    with pytest.raises(DeviceError, match="there is no NVIDIA driver"):
        require_gpu()


def test_cuda_bindings_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setattr("neo_runtime.machine.gpu._has_driver", lambda: True)
    with pytest.raises(DependencyError, match=r"cuda-bindings.*neo-onnx\[gpu\]"):
        require_gpu()


def test_the_wheel_for_cpus(cuda: FakeCuda) -> None:
    """The one that is installed here: no stand-in."""
    pytest.importorskip("onnxruntime")
    with pytest.raises(DependencyError, match=r"built without CUDA; replace it: pip uninstall"):
        require_cuda_provider(require_gpu())


def test_a_wheel_for_a_newer_cuda(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = SimpleNamespace(
        __version__="1.31.1",
        cuda_version="13.0",
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        preload_dlls=lambda: print("loaded"),
    )
    monkeypatch.setattr("neo_runtime.machine.gpu.require_onnxruntime", lambda: wheel)
    assert require_cuda_provider(require_gpu()) is wheel
    cuda.driver = 12080
    with pytest.raises(DeviceError, match=r"CUDA 13\.0, but the driver supports CUDA up to 12\.8"):
        require_cuda_provider(require_gpu())


def test_both_wheels(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    both = ["onnxruntime", "onnxruntime-gpu"]
    monkeypatch.setattr("neo_runtime.machine.installation._installed", lambda: both)
    with pytest.raises(DependencyError, match=r"installed together.*'neo-onnx\[gpu\]'"):
        require_cuda_provider(require_gpu())


def test_memory_and_other_failures_of_cuda() -> None:
    assert checked((Error.cudaSuccess, 5), "work") == 5
    with pytest.raises(DeviceMemoryError, match=r"is full: CUDA failed to allocate 100.*--int4"):
        checked((Error.cudaErrorMemoryAllocation, None), "allocate 100 bytes")
    with pytest.raises(DeviceError, match="failed to copy memory: cudaErrorUnknown"):
        checked((Error.cudaErrorUnknown, None), "copy memory")


def test_host_memory_that_cuda_does_not_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is the system's, which frees it where others end, not the device's."""
    runtime = SimpleNamespace(
        cudaSetDevice=lambda _: (Error.cudaSuccess,),
        cudaStreamNonBlocking=1,
        cudaStreamCreateWithFlags=lambda _: (Error.cudaSuccess, 7),
        cudaHostAllocDefault=0,
        cudaHostAlloc=lambda *_: (Error.cudaErrorMemoryAllocation, None),
    )
    monkeypatch.setattr("neo_runtime.backends.device.nvidia.cuda_runtime", lambda: runtime)
    with pytest.raises(HostMemoryError, match="cannot pin 100 bytes of host memory"):
        CudaDevice().pinned(100)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error cudaErrorMemoryAllocation:out of memory",
        "CUDA failure 2: out of memory ; GPU=0",
        "Non-zero status code returned while running MatMul node. Name:'m' Status Message: "
        "onnxruntime/core/framework/bfc_arena.cc:359 void* onnxruntime::BFCArena::"
        "AllocateRawInternal(size_t, bool, onnxruntime::Stream*) "
        "Failed to allocate memory for requested buffer of size 68719476736",
        "Non-zero status code returned while running MatMul node. Name:'m' Status Message: "
        "bfc_arena.cc:358 Available memory of 0 is smaller than requested bytes of 1024",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
    ],
)
def test_memory_that_onnxruntime_lacks(message: str) -> None:
    ort = importlib.import_module("onnxruntime")

    def fail(text: str, *, on_gpu: bool) -> None:
        with translated(ort, on_gpu=on_gpu):
            raise RuntimeError(text)

    with pytest.raises(DeviceMemoryError, match="lower prefill_chunk"):
        fail(message, on_gpu=True)
    with pytest.raises(NeoError, match="the system has too little free memory") as caught:
        fail(message, on_gpu=False)
    assert not isinstance(caught.value, DeviceMemoryError)


@pytest.mark.parametrize("backend", ["cuda", "tensorrt"])
def test_what_was_asked_for_or_an_error(
    backend: str, cuda_bundle: Path, tensorrt_bundle: Path, cuda: FakeCuda
) -> None:
    cuda.count = (Error.cudaErrorNoDevice, None)
    bundle = {"cuda": cuda_bundle, "tensorrt": tensorrt_bundle}[backend]
    with pytest.raises(DeviceError, match="no usable NVIDIA GPU"):
        neo_runtime.load(bundle, backend=backend)


def test_a_bundle_that_was_made_for_another_backend(
    mini_bundle: Path, cuda_bundle: Path, tensorrt_bundle: Path
) -> None:
    for bundle, backend, reason in (
        (mini_bundle, "cuda", "exported for cpu; export with --target cuda"),
        (cuda_bundle, "tensorrt", "no TensorRT plan; export with --target tensorrt"),
        (tensorrt_bundle, "cpu", "runs only from a TensorRT plan; build one with neo-engine"),
    ):
        with pytest.raises(BundleUnsupportedError, match=reason):
            neo_runtime.load(bundle, backend=backend)


def test_automatic_choice_says_what_it_took(
    cuda_bundle: Path, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.driver = 0
    with caplog.at_level(logging.INFO, "neo_runtime"), neo_runtime.load(cuda_bundle) as model:
        assert model.backend == "cpu"
        assert model.generate("Once", max_new_tokens=2).text
        assert model.backend_choice is not None
        assert "\n" not in model.backend_choice
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    said = record.getMessage()
    assert "backend cpu: cuda cannot be used (there is no NVIDIA driver" in said
    assert "slow on the CPU, so export one with --target cpu" in said


def test_a_gpu_that_works_is_taken(
    cuda_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = SimpleNamespace(
        described="NVIDIA Test (device 0)", default_chunk=1, close=lambda: None
    )
    monkeypatch.setitem(choice._OPENERS, "cuda", lambda bundle, options: opened)
    with caplog.at_level(logging.INFO, "neo_runtime"), neo_runtime.load(cuda_bundle) as model:
        assert (model.backend, model.backend_choice) == (
            "cuda",
            "backend cuda: NVIDIA Test (device 0)",
        )
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_nothing_to_choose_says_nothing(
    mini_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), neo_runtime.load(mini_bundle) as model:
        assert (model.backend, model.backend_choice) == ("cpu", None)
    assert not caplog.records


def test_a_plan_runs_without_onnxruntime(
    tensorrt_bundle: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing asks for it before TensorRT is looked for."""
    monkeypatch.setattr("neo_runtime.machine.installation._installed", list)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    cuda.driver = 0
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        neo_runtime.load(tensorrt_bundle, backend="tensorrt")


def test_bad_requests(mini_bundle: Path) -> None:
    with pytest.raises(RequestError, match="expected one of auto, cpu, cuda, tensorrt"):
        neo_runtime.load(mini_bundle, backend="gpu")
    with pytest.raises(RequestError, match="device is -1"):
        neo_runtime.load(mini_bundle, device=-1)


def test_a_plan_needs_tensorrt(
    tensorrt_bundle: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = HostDevice()
    monkeypatch.setattr("neo_runtime.backends.device.nvidia.cuda_runtime", lambda: cuda)
    monkeypatch.setattr("neo_runtime.backends.device.nvidia.CudaDevice", lambda index: device)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(DependencyError, match=r"TensorRT cannot be imported.*neo-onnx\[tensorrt\]"):
        neo_runtime.load(tensorrt_bundle, backend="tensorrt")
    assert device.closed


def test_a_gpu_without_room_for_the_weights_is_let_go(
    cuda_bundle: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = HostDevice(capacity=1000)
    monkeypatch.setattr("neo_runtime.backends.device.nvidia.cuda_runtime", lambda: cuda)
    monkeypatch.setattr("neo_runtime.backends.device.nvidia.CudaDevice", lambda index: device)
    monkeypatch.setattr("neo_runtime.machine.gpu.require_cuda_provider", lambda gpu: None)
    with pytest.raises(DeviceMemoryError):
        neo_runtime.load(cuda_bundle, backend="cuda")
    assert device.closed


@pytest.fixture
def device(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    """Host memory in the place of a GPU that everything else is right with."""
    found = HostDevice()
    monkeypatch.setattr("neo_runtime.backends.device.nvidia.cuda_runtime", lambda: cuda)
    monkeypatch.setattr("neo_runtime.backends.device.nvidia.CudaDevice", lambda index: found)
    monkeypatch.setattr("neo_runtime.machine.gpu.require_cuda_provider", lambda gpu: None)
    return found


def test_auto_finds_out_whether_sessions_can_be_made(
    cuda_bundle: Path,
    device: HostDevice,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Missing libraries of CUDA show when a first session is made: while there is a choice."""

    def missing(*_: Any) -> Any:
        raise DeviceError("CUDA's libraries are missing")

    monkeypatch.setattr("neo_runtime.backends.cuda.sessions.CudaSessions._make", missing)
    with neo_runtime.load(cuda_bundle) as model:
        assert model.backend == "cpu"
        assert model.generate([1], max_new_tokens=1).token_ids
    assert "cuda cannot be used (CUDA's libraries are missing)" in caplog.text
    assert device.closed


@pytest.mark.parametrize(("content", "error"), [("{", EngineError), ("{}", BundleUnsupportedError)])
def test_kernels_that_do_not_fit(
    content: str,
    error: type[NeoError],
    cuda_bundle: Path,
    tmp_path: Path,
    device: HostDevice,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What was asked for is refused; "auto" has the graph for the same steps, and says so."""
    bundle = shutil.copytree(cuda_bundle, tmp_path / "bundle")
    (bundle / "engines").mkdir(exist_ok=True)
    (bundle / "engines" / "cuda-sm90.kernels").write_text(content)
    with pytest.raises(error, match=r"cuda-sm90\.kernels"):
        neo_runtime.load(bundle, backend="cuda")
    with neo_runtime.load(bundle) as model:
        assert model.backend == "cuda"
        assert model.generate([1], max_new_tokens=3).token_ids
    assert "decode steps run the bundle's graph instead of its decode kernels: " in caplog.text
    assert device.closed


def test_onnxruntime_does_not_go_on_with_another_provider(
    cuda_bundle: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would print the error, and make the session on the CPU."""
    ort = importlib.import_module("onnxruntime")
    session, given = ort.InferenceSession, []

    def made(*arguments: Any, **options: Any) -> Any:
        given.append(options.get("enable_fallback"))
        return session(*arguments, **options)

    monkeypatch.setattr(ort, "InferenceSession", made)
    neo_runtime.load(cuda_bundle, backend="cuda").close()
    assert given[-2:] == [0, 0]  # prefill and decode; before them what wraps the weights


def test_a_load_that_fails_late_keeps_nothing(
    cuda_bundle: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[object] = []

    def damaged(*arguments: Any, **_: Any) -> Any:
        kept.extend(arguments)  # or the backend, being garbage, would close by itself
        raise BundleDamagedError("tokenizer.json")

    monkeypatch.setattr("neo_runtime.loading.Model", damaged)
    with pytest.raises(BundleDamagedError):
        neo_runtime.load(cuda_bundle, backend="cuda")
    assert device.closed


def test_libraries_are_looked_for_once(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What onnxruntime prints then is kept back, for the whole process: by one thread at a time."""
    calls: list[int] = []

    def preload() -> None:
        calls.append(1)
        print("it lacks libcudnn")
        time.sleep(0.05)

    wheel = SimpleNamespace(
        __version__="1.31.1",
        cuda_version="13.0",
        get_available_providers=lambda: ["CUDAExecutionProvider"],
        preload_dlls=preload,
    )
    monkeypatch.setattr("neo_runtime.machine.gpu.require_onnxruntime", lambda: wheel)
    stdout, gpu = sys.stdout, require_gpu()
    threads = [threading.Thread(target=require_cuda_provider, args=(gpu,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]
    assert sys.stdout is stdout
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("spoiled", [True, False])
def test_an_error_in_a_capture_is_the_one_that_is_raised(
    spoiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that the capture is spoiled by it; and what was captured until then is given back."""
    destroyed: list[str] = []
    ended = (Error.cudaErrorUnknown, None) if spoiled else (Error.cudaSuccess, "graph")

    def destroy(graph: str) -> tuple[Error]:
        destroyed.append(graph)
        return (Error.cudaSuccess,)

    fake = SimpleNamespace(
        cudaStreamNonBlocking=1,
        cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeThreadLocal=1),
        cudaSetDevice=lambda index: (Error.cudaSuccess,),
        cudaStreamCreateWithFlags=lambda flags: (Error.cudaSuccess, 7),
        cudaStreamBeginCapture=lambda stream, mode: (Error.cudaSuccess,),
        cudaStreamEndCapture=lambda stream: ended,
        cudaGraphDestroy=destroy,
    )
    monkeypatch.setattr("neo_runtime.backends.device.nvidia.cuda_runtime", lambda: fake)

    def queue() -> None:
        raise DeviceMemoryError("full")

    with pytest.raises(DeviceMemoryError, match="full"):
        CudaDevice().capture(queue)
    assert destroyed == ([] if spoiled else ["graph"])


@pytest.mark.parametrize("fails", [False, True])
def test_a_device_is_opened_and_closed_under_a_lock(
    fails: bool, cuda_bundle: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its driver does then would spoil another model's capture."""
    held: list[bool] = []

    class Watched(HostDevice):
        def close(self) -> None:
            held.append(any(lock.locked() for lock in device_locks._locks))
            super().close()

    def make(index: int) -> HostDevice:
        held.append(any(lock.locked() for lock in device_locks._locks))
        return Watched(capacity=1000 if fails else None)

    monkeypatch.setattr("neo_runtime.backends.device.nvidia.cuda_runtime", lambda: cuda)
    monkeypatch.setattr("neo_runtime.backends.device.nvidia.CudaDevice", make)
    monkeypatch.setattr("neo_runtime.machine.gpu.require_cuda_provider", lambda gpu: None)
    if fails:
        with pytest.raises(DeviceMemoryError):
            neo_runtime.load(cuda_bundle, backend="cuda")
    else:
        neo_runtime.load(cuda_bundle, backend="cuda").close()
    assert held == [True, True]


def test_ctrl_c_right_behind_the_beginning_of_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream is not left capturing."""
    calls: list[str] = []

    def begin(stream: int, mode: int) -> tuple[Error]:
        calls.append("begin")
        raise KeyboardInterrupt

    def end(stream: int) -> tuple[Error, str]:
        calls.append("end")
        return Error.cudaSuccess, "graph"

    fake = SimpleNamespace(
        cudaStreamNonBlocking=1,
        cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeThreadLocal=1),
        cudaSetDevice=lambda index: (Error.cudaSuccess,),
        cudaStreamCreateWithFlags=lambda flags: (Error.cudaSuccess, 7),
        cudaStreamBeginCapture=begin,
        cudaStreamEndCapture=end,
        cudaGraphDestroy=lambda graph: (Error.cudaSuccess,),
    )
    monkeypatch.setattr("neo_runtime.backends.device.nvidia.cuda_runtime", lambda: fake)
    with pytest.raises(KeyboardInterrupt):
        CudaDevice().capture(lambda: None)
    assert calls == ["begin", "end"]


def test_advice_about_the_cpu_is_for_bundles_that_it_runs(
    cuda_bundle: Path, tensorrt_bundle: Path, cuda: FakeCuda
) -> None:
    cuda.driver = 0
    with pytest.raises(DeviceError, match="--gpus all; backend cpu also runs this bundle"):
        neo_runtime.load(cuda_bundle, backend="cuda")
    with pytest.raises(DeviceError, match=r"--gpus all$"):
        neo_runtime.load(tensorrt_bundle, backend="tensorrt")


def test_prompts_are_not_planned_by_cudnn() -> None:
    """Bits of onnxruntime's `AttentionBackend`; 0 would let it choose, and 8 is cuDNN's."""
    device = object.__new__(CudaDevice)
    device.index, device.stream = 3, 7
    for capture in (False, True):
        [(name, options)] = device.providers(capture=capture)
        assert (name, options["device_id"]) == ("CUDAExecutionProvider", "3")
        chosen = int(options["sdpa_kernel"])
        assert chosen & 1, "Flash"
        assert not chosen & 8
