"""Measures the machine's limits in native code: bytes read and operations per second.

Reading is measured with several kernels over a buffer far larger than the last-level cache, each
on all threads at once; the fastest counts:

- `memchr`: the C library's search for a byte that does not occur;
- `numpy max`: numpy's SIMD reduction of float32;
- `numpy dot`: the BLAS product of a vector with itself, each call single-threaded;
- `onnxruntime MatMul`: one row of float32 times a matrix, as in a decode step, on its own threads.

Runs as a process of its own (`python -m neo_tools.bench.bandwidth`) with the protocol of
`neo_tools.worker.protocol`: {"op": "read"} and {"op": "peak"} → rates.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import threading
from functools import cache, partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from neo_tools.bench.machine import l3_bytes, memory_bytes
from neo_tools.worker.protocol import claim_stdout, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from neo_tools.worker.protocol import Handler

__all__ = ["default_buffer_bytes", "main", "time_threads"]

_ROWS = 2048
"""Rows of the matrix in the MatMul; the number of columns follows from the buffer's size."""
_PASSES = 3
_PEAK_SHAPE = (256, 2048, 2048)
"""m, k, n of the products that measure the arithmetic peak."""
_PEAK_RUNS = 5


def default_buffer_bytes() -> int:
    """16 times the last-level cache, at least 1 GiB, at most a quarter of the free memory."""
    wanted = max(1 << 30, 16 * (l3_bytes() or 0))
    free = memory_bytes("MemAvailable")
    return wanted if free is None else max(32 << 20, min(wanted, free // 4))


class Probe:
    """The buffer, and the measurements of reading it and of products."""

    def __init__(self, size: int, threads: int) -> None:
        """Allocate and fill `size` bytes."""
        import numpy as np

        columns = max(1, size // (4 * _ROWS))
        self._matrix = _distinct_values(_ROWS * columns).reshape(_ROWS, columns)
        self._threads = threads
        flat = self._matrix.reshape(-1)
        self._parts = np.array_split(flat, threads)
        self._product = _matmul_session(_ROWS, columns, threads)
        self._row = np.ones((1, _ROWS), dtype=np.float32)
        self._out = np.zeros((1, columns), dtype=np.float32)

    def read(self) -> dict[str, float]:
        """Bytes per second, by kernel; the best of a few passes each."""
        size = self._matrix.nbytes
        found: dict[str, float] = {}
        for name, kernel in _kernels().items():
            work = [partial(kernel, part) for part in self._parts]
            found[name] = size / min(time_threads(work) for _ in range(_PASSES))
        binding = self._product.io_binding()
        for name, array in (("x", self._row), ("w", self._matrix)):
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        out = self._out
        binding.bind_output("y", "cpu", 0, out.dtype.type, out.shape, out.ctypes.data)
        found["onnxruntime MatMul"] = size / min(
            time_threads([partial(self._product.run_with_iobinding, binding)])
            for _ in range(_PASSES)
        )
        return found

    def peak(self) -> dict[str, float]:
        """Operations per second of large products, by element type: the best of a few runs."""
        import numpy as np

        m, k, n = _PEAK_SHAPE
        random = np.random.default_rng(0)
        found = {}
        for name, left, right, operator in (
            ("float32", np.float32, np.float32, "MatMul"),
            ("int8", np.uint8, np.int8, "MatMulInteger"),
        ):
            weight = random.integers(-60, 60, (k, n)).astype(right)
            session = _constant_product(operator, left, weight, self._threads)
            feeds = {"x": random.integers(0, 100, (m, k)).astype(left)}
            session.run(None, feeds)
            seconds = min(
                time_threads([partial(session.run, None, feeds)]) for _ in range(_PEAK_RUNS)
            )
            found[name] = 2.0 * m * k * n / seconds
        return found


def _distinct_values(count: int) -> Any:
    """Random float32 between 1 and 2, [count], in which no byte has the value 1.

    They are random because a hypervisor may store equal pages only once, so that they fit into the
    cache.
    """
    import numpy as np

    values = np.empty(count, dtype=np.float32)
    bits = values.view(np.uint32)
    random = np.random.default_rng(0)
    chunk = 1 << 22
    for start in range(0, count, chunk):
        part = bits[start : start + chunk]
        part[:] = random.integers(0, 1 << 23, len(part), dtype=np.uint32)
        part |= 0x3F800202  # the exponent of 1.0, and bits so that no byte has the value 1
    return values


def time_threads(work: Sequence[Callable[[], Any]]) -> float:
    """Run each function in its own thread; seconds from the common start to the end of the last."""
    barrier = threading.Barrier(len(work) + 1)
    ends = [0.0] * len(work)
    errors: list[BaseException] = []

    def run(index: int, function: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)
        ends[index] = perf_counter()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(work)]
    for thread in threads:
        thread.start()
    started = perf_counter()
    barrier.wait()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return max(ends) - started


def _kernels() -> dict[str, Callable[[Any], Any]]:
    """Kernels by name; each reads a contiguous float32 array once and releases the GIL."""
    import numpy as np

    kernels: dict[str, Callable[[Any], Any]] = {
        "numpy max": np.max,
        "numpy dot": lambda part: np.dot(part, part),
    }
    try:
        memchr = ctypes.CDLL(None).memchr
    except (AttributeError, OSError, TypeError):  # the C library cannot be opened this way
        return kernels
    memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    memchr.restype = ctypes.c_void_p
    # `_distinct_values` holds no byte 1, so the search reads everything.
    kernels["memchr"] = lambda part: memchr(part.ctypes.data, 1, part.nbytes)
    return kernels


def _matmul_session(rows: int, columns: int, threads: int) -> Any:
    """The product x [1, rows] · w [rows, columns]; w is an input, so it is not copied or packed."""
    from onnx import TensorProto, helper

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    inputs = [value("x", 1, rows), value("w", rows, columns)]
    return _session([node], inputs, [value("y", 1, columns)], [], threads)


def _constant_product(operator: str, left: Any, weight: Any, threads: int) -> Any:
    """The product x [m, k] · a constant, which onnxruntime may prepack."""
    from onnx import TensorProto, helper, numpy_helper

    kind = helper.np_dtype_to_tensor_dtype(weight.dtype.type(0).astype(left).dtype)
    result = TensorProto.FLOAT if operator == "MatMul" else TensorProto.INT32
    return _session(
        [helper.make_node(operator, ["x", "w"], ["y"])],
        [helper.make_tensor_value_info("x", kind, ("m", weight.shape[0]))],
        [helper.make_tensor_value_info("y", result, ("m", weight.shape[1]))],
        [numpy_helper.from_array(weight, "w")],
        threads,
    )


def _session(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: list[Any], threads: int
) -> Any:
    from neo_runtime.machine.installation import require_onnxruntime
    from onnx import helper

    graph = helper.make_graph(nodes, "probe", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnxruntime = require_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def main(argv: list[str]) -> None:
    """Serve requests from stdin."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # before numpy is imported: the threads here are ours
    answers = claim_stdout()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bytes", type=int, default=None)
    arguments = parser.parse_args(argv)

    @cache
    def probe() -> Probe:
        # Created at the first request, so that an error becomes its answer.
        return Probe(arguments.bytes or default_buffer_bytes(), arguments.threads)

    handlers: dict[str, Handler] = {
        "read": lambda request: {"rates": probe().read()},
        "peak": lambda request: {"rates": probe().peak()},
    }
    serve(handlers, sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
