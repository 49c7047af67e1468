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
from neo_tools.bench.device_memory import ProcessMemory, bus_id

BUS = "0000:00:06.0"
USED = {os.getpid(): 3_500_000_000, os.getpid() + 1: 9}


class FakeNvml:
    """Answers in the layout of nvmlProcessInfo_t (nvml.h): 24 bytes a process."""

    def __init__(
        self,
        used: dict[int, int],
        *,
        before: tuple[int, ...] = (),
        failing: str = "",
        lacking: str = "",
    ) -> None:
        self.later, self.failing, self.lacking = used, failing, lacking
        self.used = dict.fromkeys(before, 7)
        """Before this process has a context."""
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
        if name == "nvmlDeviceGetCount_v2":
            arguments[0]._obj.value = 1
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
    def make_context(device: int) -> str:
        driver.used = driver.later
        return BUS

    monkeypatch.setattr(
        device_memory,
        "ctypes",
        SimpleNamespace(**vars(ctypes) | {"CDLL": lambda name: driver}),
    )
    monkeypatch.setattr(device_memory, "bus_id", make_context)


def test_the_bytes_of_this_process_and_of_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeNvml(USED, before=(os.getpid() + 1,))
    play(monkeypatch, driver)
    memory = ProcessMemory(0)
    assert memory.bytes() == 3_500_000_000
    driver.used = {**USED, os.getpid(): 11}
    assert memory.bytes() == 11
    assert driver.calls[-1] == "nvmlShutdown"


def test_a_process_that_has_another_number_outside_of_its_container(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is the one that has come with the context."""
    driver = FakeNvml({4_000_001: 9, 4_000_002: 3_500_000_000}, before=(4_000_001,))
    play(monkeypatch, driver)
    memory = ProcessMemory(0)
    assert memory.bytes() == 3_500_000_000
    driver.used = {4_000_001: 9}
    assert memory.bytes() is None


@pytest.mark.parametrize(
    "driver",
    [
        FakeNvml({}),
        FakeNvml({4_000_001: 8, 4_000_002: 9}),
        FakeNvml({os.getpid(): (1 << 64) - 1}),
        FakeNvml(USED, failing="nvmlInit_v2"),
        FakeNvml(USED, failing="nvmlDeviceGetHandleByPciBusId_v2"),
        FakeNvml(USED, failing="nvmlDeviceGetComputeRunningProcesses_v3"),
        FakeNvml(USED, lacking="nvmlDeviceGetComputeRunningProcesses_v3"),
    ],
    ids=[
        "no process",
        "which of two",
        "not counted",
        "no driver",
        "no such device",
        "not supported",
        "old",
    ],
)
def test_no_figure_where_the_driver_gives_none(
    driver: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, driver)
    assert ProcessMemory(0).bytes() is None


def test_no_driver_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "_LIBRARY", "libno-such-nvml.so.1")
    monkeypatch.setattr(device_memory, "bus_id", lambda device: BUS)
    assert ProcessMemory(0).bytes() is None


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
    memory = SimpleNamespace(bytes=lambda: next(held))
    monkeypatch.setattr(worker, "ProcessMemory", lambda device: memory)

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
