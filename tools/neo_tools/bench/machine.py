"""Facts about the measured machine, and its load by other programs."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.machine.cores import physical_cores, usable_processors

from neo_tools.older_cpu import ENVIRONMENT_VARIABLE
from neo_tools.worker.versions import versions_of

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "BUSY_SHARE",
    "CpuWatch",
    "Machine",
    "busy_warning",
    "cached_weights_warning",
    "hidden_warning",
    "l3_bytes",
    "machine_facts",
    "memory_bytes",
    "small_buffer_warning",
]

BUSY_SHARE = 0.15
"""A report warns if other programs use more than this share of the processors."""

_FLAGS = (
    "avx2",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "neo-onnx", "numpy")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts about the machine, for a report."""

    cpu: str
    flags: tuple[str, ...]
    """Those of the relevant instruction sets that the processor has."""
    cores: int
    """Physical cores that this process may use."""
    processors: int
    """Hardware threads that this process may use."""
    l3_bytes: int | None
    memory_bytes: int | None
    system: str
    python: str
    versions: dict[str, str]
    load_average: float | None
    """Load average of the last minute before the run; None if the system has none."""


def machine_facts() -> Machine:
    """Facts from /proc and the installed packages; unavailable ones are left out."""
    cpu, flags = _cpu()
    versions = versions_of(_PACKAGES)
    return Machine(
        cpu=cpu,
        flags=flags,
        cores=physical_cores(),
        processors=usable_processors(),
        l3_bytes=l3_bytes(),
        memory_bytes=memory_bytes("MemTotal"),
        system=f"{platform.system()} {platform.release()}",
        python=versions.pop("python"),
        versions=versions,
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def busy_warning(machine: Machine) -> str | None:
    """A line for the report if the load average shows that other programs compute here."""
    load = machine.load_average
    if load is None or load <= BUSY_SHARE * machine.processors:
        return None
    return (
        f"the load average was {load:.2f} on {machine.processors} processors before the run: "
        "the machine is busy, and the times do not show what it can do"
    )


def small_buffer_warning(machine: Machine, probe_bytes: int | None) -> str | None:
    """A line for the report if the user's buffer is so small that it measures the cache."""
    if probe_bytes is None or probe_bytes >= 4 * (machine.l3_bytes or 0):
        return None
    return (
        f"the buffer of the bandwidth measurement, {probe_bytes / 1e6:.0f} MB, is not much larger "
        f"than the last-level cache of {(machine.l3_bytes or 0) / 1e6:.0f} MB: part of what was "
        "measured is the cache"
    )


def cached_weights_warning(machine: Machine, weights: Mapping[str, int]) -> str | None:
    """A line for the report if a step's weights may fit into the cache.

    Args:
        machine: the machine.
        weights: bytes that a decode step reads, by bundle.
    """
    cache = machine.l3_bytes or 0
    fitting = [f"{label} ({size / 1e6:.1f} MB)" for label, size in weights.items() if size <= cache]
    if not fitting:
        return None
    return (
        f"the weights of {', '.join(fitting)} fit in the last-level cache of {cache / 1e6:.0f} MB: "
        "shares of the memory's bandwidth say nothing then, nor do ratios of memory to weights"
    )


def hidden_warning() -> str | None:
    """A line for the report if `neo_tools.older_cpu` runs this process."""
    hidden = os.environ.get(ENVIRONMENT_VARIABLE)
    if not hidden:
        return None
    return (
        f"{hidden} are hidden from all who take part: the times are of this CPU with the kernels "
        "for AVX2"
    )


def _cpu() -> tuple[str, tuple[str, ...]]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), ()
    found: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    flags = set((found.get("flags") or found.get("Features") or "").split())
    name = found.get("model name") or platform.processor() or platform.machine()
    return name, tuple(flag for flag in _FLAGS if flag in flags)


def l3_bytes() -> int | None:
    """Bytes of the first processor's last-level cache; None if the system does not tell."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = []
    for path in folder.glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 0)
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes, default=None)


def memory_bytes(field: str) -> int | None:
    """A field of /proc/meminfo, such as "MemAvailable"."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


class CpuWatch:
    """Measures the processor time of other programs between construction and `others`."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._system = _system_seconds()
        self._own = _own_seconds()

    def others(self) -> float | None:
        """Average number of processors that others kept busy; call it after all children ended.

        Time that the hypervisor gave to other machines counts. None if the system does not tell.
        """
        system = _system_seconds()
        elapsed = time.monotonic() - self._started
        if self._system is None or system is None or elapsed <= 0:
            return None
        return max(0.0, (system - self._system) - (_own_seconds() - self._own)) / elapsed

    def warning(self, processors: int) -> str | None:
        """A line for the report if others used more than `BUSY_SHARE`."""
        others = self.others()
        if others is None or others <= BUSY_SHARE * processors:
            return None
        return (
            f"other programs used {others:.2f} of {processors} processors during the run; "
            "repeat it on a quiet machine"
        )


def _own_seconds() -> float:
    """Processor time of this process and of its ended children, in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _system_seconds() -> float | None:
    """Processor time of all programs since boot, in seconds, steal included (proc_stat(5))."""
    try:
        first = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
