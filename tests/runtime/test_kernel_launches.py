"""How kernels are loaded and launched, by a driver that is stood in for."""

from __future__ import annotations

import base64
import hashlib
import shutil
from ctypes import c_int32, c_void_p
from enum import IntEnum
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import neo_runtime
import pytest
from helpers.host_device import HostDevice
from neo_runtime.backends.device.base import KernelCall
from neo_runtime.backends.device.nvidia import CudaDevice
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.bundle.step_kernels import Kernel, StepKernels, kernels_path
from neo_runtime.errors import DeviceError, EngineError
from neo_runtime.machine.gpu import GpuFacts

if TYPE_CHECKING:
    from pathlib import Path


class Result(IntEnum):
    """Names and numbers of CUDA's own."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209


_OK = (Result.CUDA_SUCCESS,)
_SHARED = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
_EARLY = "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"


class FakeDriver:
    """The part of `cuda.bindings.driver` that loads and launches."""

    CUfunction_attribute = SimpleNamespace(**{_SHARED: _SHARED})
    CUlaunchAttributeID = SimpleNamespace(**{_EARLY: _EARLY})

    def __init__(self, fails_at: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._fails_at = fails_at

    def CUlaunchConfig(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(attrs=[], numAttrs=0)

    def CUlaunchAttribute(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(id=None, value=SimpleNamespace())

    def CUstream(self, handle: int) -> tuple[str, int]:  # noqa: N802
        return "stream", handle

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name == self._fails_at:
                return (Result.CUDA_ERROR_NO_BINARY_FOR_GPU, None)
            return (*_OK, f"{name}'s") if name in ("cuModuleLoadData", _GET) else _OK

        return call


_GET = "cuModuleGetFunction"
_MODULE, _FUNCTION = "cuModuleLoadData's", f"{_GET}'s"


def device_over(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    runtime = SimpleNamespace(
        cudaStreamNonBlocking=1,
        cudaSetDevice=lambda index: _OK,
        cudaStreamCreateWithFlags=lambda flags: (*_OK, 7),
    )
    monkeypatch.setattr("neo_runtime.backends.device.nvidia.cuda_runtime", lambda: runtime)
    monkeypatch.setattr("neo_runtime.backends.device.nvidia.cuda_driver", lambda: driver)
    return CudaDevice()


@pytest.mark.parametrize("shared", [48 << 10, (48 << 10) + 1])
def test_more_shared_memory_than_usual_is_asked_for(
    shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = FakeDriver()
    device = device_over(driver, monkeypatch)
    assert device.load_kernel(b"image", "project", shared) == (_MODULE, _FUNCTION)
    asked = [("cuFuncSetAttribute", _FUNCTION, _SHARED, shared)] if shared > 48 << 10 else []
    loaded = [("cuModuleLoadData", b"image"), (_GET, _MODULE, b"project")]
    assert driver.calls == [*loaded, ("cuFuncLoad", _FUNCTION), *asked]


@pytest.mark.parametrize("fails_at", [_GET, "cuFuncLoad", "cuFuncSetAttribute"])
def test_a_kernel_that_does_not_load_leaves_no_module(
    fails_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = FakeDriver(fails_at)
    device = device_over(driver, monkeypatch)
    with pytest.raises(DeviceError, match="CUDA_ERROR_NO_BINARY_FOR_GPU"):
        device.load_kernel(b"image", "project", 1 << 16)
    assert driver.calls[-1] == ("cuModuleUnload", _MODULE)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_launch(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    device = device_over(driver, monkeypatch)
    call = KernelCall(
        grid=(3, 2, 1),
        threads=128,
        shared_bytes=512,
        arguments=((1 << 40, 8), (5, 4), (0, 8)),
        overlap=overlap,
    )
    device.launch((_MODULE, _FUNCTION), call)
    [(name, config, function, arguments, extra)] = driver.calls
    assert (name, function, extra) == ("cuLaunchKernelEx", _FUNCTION, 0)
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (3, 2, 1)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (128, 1, 1)
    assert (config.sharedMemBytes, config.hStream) == (512, ("stream", 7))
    assert arguments == ((1 << 40, 5, 0), (c_void_p, c_int32, c_void_p))
    assert config.numAttrs == len(config.attrs) == overlap
    for attribute in config.attrs:
        assert attribute.id == _EARLY
        assert attribute.value.programmaticStreamSerializationAllowed == 1


def spoiled_kernels(bundle: Path, image: bytes, digest: str) -> None:
    """A file of one kernel that fits the bundle, with a checksum that may not fit the kernel."""
    kernel = Kernel(
        name="project",
        program="project",
        constants={},
        types=(),
        image=base64.b64encode(image).decode(),
        sha256=digest,
        threads=128,
        shared_bytes=0,
    )
    kernels = StepKernels(
        bundle_digest=open_bundle(bundle).manifest.digest,
        compute_capability="9.0",
        compiler="none",
        memory_bytes=256,
        overlap=False,
        kernels=(kernel,),
        steps=(),
    )
    path = kernels_path(bundle, "9.0")
    path.parent.mkdir(exist_ok=True)
    path.write_text(kernels.to_json())


def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine seems to have a GPU, whose device the test stands in for."""
    gpu = GpuFacts(
        index=0, name="GPU", compute_capability="9.0", memory_bytes=1, driver_cuda=(13, 0)
    )
    monkeypatch.setattr("neo_runtime.machine.gpu.require_gpu", lambda index: gpu)
    monkeypatch.setattr("neo_runtime.machine.gpu.require_cuda_provider", lambda gpu: None)


@pytest.mark.parametrize(
    ("digest", "message"),
    [
        ("0" * 64, "does not match its checksum"),
        (hashlib.sha256(b"image").hexdigest(), r"cannot be loaded \(the driver is too old\)"),
    ],
)
def test_auto_does_without_kernels_that_do_not_load(
    digest: str,
    message: str,
    cuda_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The GPU still runs the graph: a slow CPU in its place would be the wrong way out."""

    class Refusing(HostDevice):
        def load_kernel(self, image: bytes, name: str, shared_bytes: int) -> Any:
            raise DeviceError("the driver is too old")

    made: list[HostDevice] = []

    def make(index: int) -> HostDevice:
        made.append(Refusing())
        return made[-1]

    bundle = shutil.copytree(cuda_bundle, tmp_path / "bundle")
    spoiled_kernels(bundle, b"image", digest)
    with_a_gpu(monkeypatch)
    monkeypatch.setattr("neo_runtime.backends.device.nvidia.CudaDevice", make)
    with pytest.raises(EngineError, match=message):
        neo_runtime.load(bundle, backend="cuda")
    with neo_runtime.load(bundle) as model:
        assert (model.backend, model.backend_choice) == ("cuda", "backend cuda: GPU (device 0)")
        assert model.generate([1], max_new_tokens=3).token_ids
    assert "decode steps run the bundle's graph instead of its decode kernels: " in caplog.text
    assert all(device.closed for device in made)


def test_what_fails_without_kernels_is_not_put_down_to_them(
    cuda_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[int] = []

    def fail(index: int) -> HostDevice:
        opened.append(index)
        raise EngineError("nothing runs here")

    with_a_gpu(monkeypatch)
    monkeypatch.setattr("neo_runtime.backends.device.nvidia.CudaDevice", fail)
    neo_runtime.load(cuda_bundle).close()
    assert opened == [0], "tried once"
    assert "nothing runs here" in caplog.text
    assert "decode steps" not in caplog.text
