"""`python -m neo_tools.bench.operators`: times the candidates for a quantized matrix product.

Each candidate multiplies activations [rows, 2048] with several matrices [2048, 8192] one after the
other, so that one row is memory-bound as in a model. Candidates take turns within a round; a figure
is the median of the rounds, per matrix.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from neo_runtime.command.command_line import OneLineParser

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["CANDIDATES", "main", "measure"]

WIDTH, OUTPUTS = 2048, 8192
_OPSETS = {"": 18, "com.microsoft": 1}


class _Graph:
    """A graph under construction, with numpy arrays as constants."""

    def __init__(self, matrices: int) -> None:
        import onnx

        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.matrices = matrices

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> str:
        self.constants.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        domain = "com.microsoft" if operator.startswith("MatMul") and operator != "MatMul" else ""
        node = self.onnx.helper.make_node(operator, inputs, [output], domain=domain, **attributes)
        self.nodes.append(node)
        return output

    def serialized(self) -> bytes:
        helper, float32 = self.onnx.helper, self.onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            "candidate",
            [helper.make_tensor_value_info("x", float32, [1, "rows", WIDTH])],
            [
                helper.make_tensor_value_info(f"y{i}", float32, [1, "rows", OUTPUTS])
                for i in range(self.matrices)
            ],
            self.constants,
        )
        opsets = [helper.make_opsetid(domain, number) for domain, number in _OPSETS.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        data: bytes = model.SerializeToString()
        return data


def _float32(graph: _Graph, rng: np.random.Generator) -> None:
    for i in range(graph.matrices):
        weight = rng.standard_normal((WIDTH, OUTPUTS), dtype=np.float32)
        graph.node("MatMul", ["x", graph.constant(f"w{i}", weight)], f"y{i}")


def _integer(graph: _Graph, rng: np.random.Generator) -> None:
    step = graph.constant("step", np.array(1 / 127, np.float32))
    zero = graph.constant("zero", np.array(128, np.uint8))
    axis = graph.constant("axis", np.array([-1], np.int64))
    row = graph.node("ReduceMax", [graph.node("Abs", ["x"], "size"), axis], "row", keepdims=1)
    scaled = graph.node("Div", ["x", row], "scaled")
    quantized = graph.node("QuantizeLinear", [scaled, step, zero], "quantized")
    for i in range(graph.matrices):
        weight = graph.constant(f"w{i}", rng.integers(-63, 64, (WIDTH, OUTPUTS), dtype=np.int8))
        scales = graph.constant(f"s{i}", rng.random(OUTPUTS, dtype=np.float32))
        inputs = [quantized, weight, step, scales, zero]
        product = graph.node("MatMulIntegerToFloat", inputs, f"product{i}")
        graph.node("Mul", [product, row], f"y{i}")


def _blocks(graph: _Graph, rng: np.random.Generator, *, bits: int, block: int) -> None:
    blocks = WIDTH // block
    for i in range(graph.matrices):
        shape = (OUTPUTS, blocks, block * bits // 8)
        weight = graph.constant(f"w{i}", rng.integers(0, 256, shape, dtype=np.uint8))
        scales = graph.constant(f"s{i}", rng.random((OUTPUTS, blocks), dtype=np.float32))
        graph.node(
            "MatMulNBits",
            ["x", weight, scales],
            f"y{i}",
            K=WIDTH,
            N=OUTPUTS,
            bits=bits,
            block_size=block,
            accuracy_level=4,
        )


CANDIDATES: dict[str, tuple[Callable[[_Graph, np.random.Generator], None], bool]] = {
    "float32": (_float32, True),
    "float32, not prepacked": (_float32, False),
    "int8, MatMulIntegerToFloat, one scale per row": (_integer, True),
    "the same, not prepacked": (_integer, False),
    **{
        f"int{bits}, MatMulNBits, block {block}": (partial(_blocks, bits=bits, block=block), True)
        for bits, block in ((8, 32), (8, 128), (4, 32), (4, 64), (4, 128))
    },
}
"""Name → function that writes the graph, and whether onnxruntime may prepack its weights."""


def measure(
    names: Sequence[str], rows: Sequence[int], *, threads: int, rounds: int, matrices: int = 8
) -> dict[tuple[str, int], float]:
    """Median seconds per matrix, by candidate and rows."""
    from neo_runtime.machine.installation import require_onnxruntime

    ort = require_onnxruntime()

    rng = np.random.default_rng(0)
    sessions = {}
    for name in names:
        write, prepack = CANDIDATES[name]
        graph = _Graph(matrices)
        write(graph, rng)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # Otherwise the previous candidate's threads would spin while this one is measured.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
        sessions[name] = ort.InferenceSession(graph.serialized(), options)
        print(f"prepared: {name}", file=sys.stderr)
    times: dict[tuple[str, int], list[float]] = {}
    for count in rows:
        x = rng.standard_normal((1, count, WIDTH), dtype=np.float32)
        for _ in range(rounds + 1):  # the first is a warm-up
            for name, session in sessions.items():
                start = time.perf_counter()
                session.run(None, {"x": x})
                seconds = time.perf_counter() - start
                times.setdefault((name, count), []).append(seconds / matrices)
    return {key: float(np.median(values[1:])) for key, values in times.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a Markdown table; returns the exit status."""
    parser = OneLineParser(
        prog="python -m neo_tools.bench.operators",
        description="Time the candidates for a quantized matrix product, side by side.",
    )
    for flags, default, text in (
        (("-t", "--threads"), 2, "threads per product"),
        (("-r", "--rounds"), 7, "timed rounds, after one to warm up"),
    ):
        parser.add_argument(
            *flags, type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[1, 8, 128],
        metavar="N",
        help="rows of the activations, each measured (default: 1 8 128)",
    )
    arguments = parser.parse_args(argv)
    names = list(CANDIDATES)
    found = measure(names, arguments.rows, threads=arguments.threads, rounds=arguments.rounds)
    print("| ms per matrix, rows: | " + " | ".join(map(str, arguments.rows)) + " |")
    print("|---|" + "---|" * len(arguments.rows))
    for name in names:
        cells = (f"{1e3 * found[name, count]:.2f}" for count in arguments.rows)
        print(f"| {name} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
