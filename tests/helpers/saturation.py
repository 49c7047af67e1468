"""Products of extreme weights and activations, by onnxruntime's integer kernel and in int64.

Run as a script it needs numpy and onnxruntime alone, so that it also starts quickly on an emulated
CPU:

    python tests/helpers/saturation.py GRAPH LIMIT    # the largest difference, and the largest sum

GRAPH is what `write_graph` wrote for LIMIT, the largest weight of either sign.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

WIDTH = 64
"""Inputs of each product: pairs, and fours, and whole vector registers of them."""
ROWS = (1, 3, 8)
"""Rows of activations: kernels for one row and for several differ."""


def difference(graph: str, limit: int) -> tuple[float, float]:
    """Largest absolute difference to exact arithmetic, and largest exact sum, over all rows."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    weights = extreme_weights(limit)
    worst, largest = 0.0, 0.0
    for rows in ROWS:
        quantized = extreme_activations(rows)
        [found] = session.run(None, {"quantized": quantized})
        exact = (quantized.astype(np.int64) - 128) @ weights.astype(np.int64)
        worst = max(worst, float(np.abs(found.astype(np.float64) - exact).max()))
        largest = max(largest, float(np.abs(exact).max()))
    return worst, largest


def extreme_weights(limit: int) -> NDArray[np.int8]:
    """int8 [WIDTH, 8]: all at one limit, at the other, alternating, in pairs, and random signs."""
    at = np.arange(WIDTH)
    signs = [
        np.ones(WIDTH),
        -np.ones(WIDTH),
        np.where(at % 2, -1, 1),
        np.where(at // 2 % 2, -1, 1),
        np.where(at // 4 % 2, -1, 1),
        *np.random.default_rng(0).choice([-1.0, 1.0], (3, WIDTH)),
    ]
    return (np.array(signs) * limit).astype(np.int8).T.copy()


def extreme_activations(rows: int) -> NDArray[np.uint8]:
    """uint8 [rows, WIDTH], zero point 128: ±max of their row, and beyond (0 and 255)."""
    at = np.arange(WIDTH)
    kinds = np.array(
        [
            np.full(WIDTH, 255),
            np.full(WIDTH, 1),
            np.where(at % 2, 1, 255),
            np.full(WIDTH, 0),
            np.where(at // 2 % 2, 1, 255),
            np.where(at // 4 % 2, 1, 255),
            np.full(WIDTH, 128),
            np.random.default_rng(1).choice([0, 1, 255], WIDTH),
        ]
    )
    return kinds[:rows].astype(np.uint8)


def write_graph(path: str, limit: int) -> None:
    """The product as in the int8 graphs, with all scales 1, so that sums are integers."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    constants = [
        numpy_helper.from_array(extreme_weights(limit), "weights"),
        helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("scales", TensorProto.FLOAT, [8], [1.0] * 8),
        helper.make_tensor("zero", TensorProto.UINT8, [], [128]),
    ]
    node = helper.make_node(
        "MatMulIntegerToFloat",
        ["quantized", "weights", "one", "scales", "zero"],
        ["sums"],
        domain="com.microsoft",
    )
    graph = helper.make_graph(
        [node],
        "extremes",
        [helper.make_tensor_value_info("quantized", TensorProto.UINT8, ["rows", WIDTH])],
        [helper.make_tensor_value_info("sums", TensorProto.FLOAT, ["rows", 8])],
        constants,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opsets), path)


if __name__ == "__main__":
    print(*difference(sys.argv[1], int(sys.argv[2])))
