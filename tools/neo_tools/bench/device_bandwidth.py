"""Measures the bandwidth of a GPU's memory: bytes per second of a copy inside it.

A copy reads and writes each byte; both count, as in vendors' figures. The block is a gigabyte, far
larger than any cache. Has the protocol of `bandwidth`: {"op": "read"}. Arithmetic is not measured
({"op": "peak"} returns no rates).
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

from neo_tools.worker.protocol import claim_stdout, serve

if TYPE_CHECKING:
    from neo_tools.worker.protocol import Handler

__all__ = ["copy_rate", "main"]

KERNEL = "device copy"
_BYTES = 1 << 30
_COPIES, _PASSES = 8, 5


def copy_rate(device: Any, size: int, *, copies: int = _COPIES, passes: int = _PASSES) -> float:
    """Bytes read and written per second; the best of `passes`.

    Args:
        device: a `neo_runtime.backends.device.base.Device`.
        size: bytes of a block; two are allocated.
        copies: number of copies in a pass, one after the other.
        passes: number of passes.
    """
    source, target = device.allocate(size), device.allocate(size)
    try:
        device.zero(source, size)
        device.synchronize()
        best = 0.0
        for _ in range(passes):
            started = perf_counter()
            for _ in range(copies):
                device.copy_rows(target, size, source, size, size, 1)
            device.synchronize()
            best = max(best, 2.0 * size * copies / (perf_counter() - started))
        return best
    finally:
        device.free(source)
        device.free(target)


def main(argv: list[str]) -> None:
    """Serve requests from stdin."""
    answers = claim_stdout()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--bytes", type=int, default=_BYTES)
    arguments = parser.parse_args(argv)

    @cache
    def device() -> Any:
        from neo_runtime.backends.device.nvidia import CudaDevice
        from neo_runtime.machine.gpu import require_gpu

        require_gpu(arguments.device)
        return CudaDevice(arguments.device)

    handlers: dict[str, Handler] = {
        "read": lambda request: {"rates": {KERNEL: copy_rate(device(), arguments.bytes)}},
        "peak": lambda request: {"rates": {}},
    }
    serve(handlers, sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
