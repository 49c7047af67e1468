"""What a process holds of a GPU's memory, from a driver that is played by ctypes."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from neo_runtime.errors import DeviceError, RequestError
from neo_tools.bench import device_memory, worker
from neo_tools.bench.device_memory import bus_id, process_device_bytes

BUS = "0000:00:06.0"
USED = {os.getpid(): 3_500_000_000, os.getpid() + 1: 9}


class FakeNvml:
    """Answers in the layout of nvmlProcessInfo_t (nvml.h): 24 bytes a process."""

    def __init__(self, used: dict[int, int], *, failing: str = "", lacking: str = "") -> None:
        self.used, self.failing, self.lacking = used, failing, lacking
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self.failing:
                return 3  # NVML_ERROR_NOT_SUPPORTED
            return self._answer(name, arguments)

        if name == self.lacking:
            raise AttributeError(name)
        return call

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> int:
        if name == "nvmlDeviceGetHandleByPciBusId_v2":
            assert arguments[0] == BUS.encode()
        if name == "nvmlDeviceGetComputeRunningProcesses_v3":
            count, array = arguments[1]._obj, arguments[2]
            assert count.value == len(array)
            raw = b"".join(
                pid.to_bytes(8, "little") + used.to_bytes(8, "little") + bytes(8)
                for pid, used in self.used.items()
            )
            ctypes.memmove(array, raw, len(raw))
            count.value = len(self.used)
        return 0


def play(monkeypatch: pytest.MonkeyPatch, driver: FakeNvml) -> None:
    monkeypatch.setattr(
        device_memory,
        "ctypes",
        SimpleNamespace(**vars(ctypes) | {"CDLL": lambda name: driver}),
    )


def test_the_bytes_of_this_process_and_of_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeNvml(USED)
    play(monkeypatch, driver)
    assert process_device_bytes(BUS) == 3_500_000_000
    assert process_device_bytes(BUS, os.getpid() + 1) == 9
    assert driver.calls[-1] == "nvmlShutdown"


@pytest.mark.parametrize(
    "driver",
    [
        FakeNvml({}),
        FakeNvml({os.getpid(): (1 << 64) - 1}),
        FakeNvml(USED, failing="nvmlInit_v2"),
        FakeNvml(USED, failing="nvmlDeviceGetHandleByPciBusId_v2"),
        FakeNvml(USED, failing="nvmlDeviceGetComputeRunningProcesses_v3"),
        FakeNvml(USED, lacking="nvmlDeviceGetComputeRunningProcesses_v3"),
    ],
    ids=["another namespace", "not counted", "no driver", "no such device", "not supported", "old"],
)
def test_no_figure_where_the_driver_gives_none(
    driver: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, driver)
    assert process_device_bytes(BUS) is None


def test_no_driver_at_all() -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver here")
    assert process_device_bytes(BUS) is None


def test_a_gpu_is_named_by_where_it_sits(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    runtime = SimpleNamespace(
        cudaSetDevice=lambda device: (0 if device == 1 else 101,),
        cudaFree=lambda address: (made.append(address) or 0,),
        cudaDeviceGetPCIBusId=lambda length, device: (0, BUS.encode() + bytes(length - len(BUS))),
    )
    monkeypatch.setattr("neo_runtime.machine.gpu.cuda_runtime", lambda: runtime)
    assert bus_id(1) == BUS
    assert made == [0], "a context"
    with pytest.raises(DeviceError, match="select device 0"):
        bus_id(0)


def test_the_context_of_cuda_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was held before the model was loaded is no memory of the model."""
    held = iter([500_000_000, 3_300_000_000, None])
    monkeypatch.setattr(worker, "bus_id", lambda device: BUS)
    monkeypatch.setattr(worker, "process_device_bytes", lambda bus: next(held))

    def load(*_: object, **__: object) -> None:
        raise RequestError("enough seen")

    monkeypatch.setattr("neo_runtime.load", load)
    engine = worker.NeoEngine(Path("bundle"), 1, None, backend="cuda")
    with pytest.raises(RequestError):
        engine.load()
    ask = engine.handlers()["device_memory"]
    assert ask({}) == {"bytes": 2_800_000_000}
    assert ask({}) == {"bytes": None}
    on_the_cpu = worker.NeoEngine(Path("bundle"), 1, None)
    assert on_the_cpu.handlers()["device_memory"]({}) == {"bytes": None}
