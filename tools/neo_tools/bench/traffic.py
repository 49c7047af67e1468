"""The bytes that a decode step must read, and its arithmetic operations: counted, not measured.

Weights are counted in the decode graph: the bytes of every tensor that a node reads, once each even
if it has several names. A table that only Gather nodes read counts as one row per sequence
(positions), also if they read it transposed: onnxruntime transposes it when it loads the graph. A
tied table is also the head's matrix, so all of it counts, once. The cache counts with the positions
that attention needs: all of them in a global layer, the window in a local one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from neo_runtime.errors import DependencyError
from neo_runtime.machine.installation import install_command

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from neo_runtime.bundle.manifest import ModelSpec

__all__ = [
    "NOMINAL_BYTES",
    "StepWeights",
    "cache_bytes_per_step",
    "decode_flops",
    "decode_weights",
    "nominal_weights",
    "prefill_flops",
    "require_onnx",
]

_GATHERS = {"Gather": ("axis", (0,)), "GatherBlockQuantized": ("gather_axis", (0, 2, 3))}
"""Operators that read rows of a table → the attribute with the axis, and the inputs that are
tables."""

NOMINAL_BYTES: dict[str, tuple[float, float]] = {
    "fp32": (4.0, 4.0),
    "bf16": (2.0, 2.0),
    "fp16": (2.0, 2.0),
    "fp16-compiled": (2.0, 2.0),
    "int8": (1.0, 1.0),
    # optimum-intel's int4: groups of 128 with a float16 scale and a 4-bit zero point; head int8.
    "int4": (0.5 + 2.5 / 128, 1.0),
}
"""Bytes per weight by a peer's precision: in the layers' matrices, and in the head's."""


@dataclass(frozen=True, kw_only=True)
class StepWeights:
    """Bytes of weights that one decode step reads."""

    dense: int
    """Bytes that do not depend on the batch."""
    per_row: int
    """Additional bytes per sequence of the batch: rows of tables that are only looked up."""

    def total(self, batch: int) -> int:
        """Bytes for a batch."""
        return self.dense + self.per_row * batch


@dataclass(frozen=True)
class _Extent:
    """The range of a tensor's bytes in a file."""

    location: str
    start: int
    stop: int


def require_onnx() -> Any:
    """Import onnx, which reads the graphs.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise DependencyError(
            "neo-bench reads graphs with the package onnx, which is not installed: "
            + install_command("bench")
        ) from error
    return onnx


def decode_weights(graph: Path) -> StepWeights:
    """Count the weights of a decode graph.

    Args:
        graph: path of `decode.onnx`; its external data is not opened.
    """
    onnx = require_onnx()
    model = onnx.load(graph, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    dense, looked_up = _read(model.graph.node, tensors)
    whole = {_extent(onnx, tensors[name]) for name in dense}
    per_row = 0
    for name, axis in looked_up.items():
        extent = _extent(onnx, tensors[name])
        if not any(_overlap(extent, other) for other in whole):
            per_row += (extent.stop - extent.start) // max(1, tensors[name].dims[axis])
    return StepWeights(dense=_union_bytes(whole), per_row=per_row)


def _read(nodes: Iterable[Any], tensors: Mapping[str, Any]) -> tuple[set[str], dict[str, int]]:
    """Names of tensors that are read whole; and of looked-up ones, with the axis of their rows."""
    dense: set[str] = set()
    looked_up: dict[str, int] = {}
    turned: dict[str, tuple[str, list[int] | None]] = {}
    for node in nodes:
        if node.op_type == "Transpose" and node.input[0] in tensors:
            reverse = list(reversed(range(len(tensors[node.input[0]].dims))))
            perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), reverse)
            turned[node.output[0]] = (node.input[0], perm)
            continue
        attribute, tables = _GATHERS.get(node.op_type, ("", ()))
        axis = next((a.i for a in node.attribute if a.name == attribute), 0)
        for index, name in enumerate(node.input):
            source, axes = turned.get(name, (name, None))
            if source not in tensors:
                continue
            if index in tables:
                looked_up[source] = axis if axes is None else axes[axis]
            else:
                dense.add(source)
    return dense, looked_up


def _extent(onnx: Any, tensor: Any) -> _Extent:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if "location" not in entries:
        size = len(tensor.raw_data) or _computed_size(onnx, tensor)
        return _Extent(f"inside the graph: {tensor.name}", 0, size)
    start = int(entries.get("offset", 0))
    size = int(entries.get("length", 0)) or _computed_size(onnx, tensor)
    return _Extent(entries["location"], start, start + size)


def _computed_size(onnx: Any, tensor: Any) -> int:
    itemsize = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    return math.prod(map(int, tensor.dims)) * int(itemsize)


def _overlap(a: _Extent, b: _Extent) -> bool:
    return a.location == b.location and a.start < b.stop and b.start < a.stop


def _union_bytes(extents: Iterable[_Extent]) -> int:
    """Bytes that the extents cover; overlaps count once."""
    total = 0
    place, end = "", 0
    for extent in sorted(extents, key=lambda e: (e.location, e.start)):
        if extent.location != place:
            place, end = extent.location, 0
        total += max(0, extent.stop - max(extent.start, end))
        end = max(end, extent.stop)
    return total


def nominal_weights(model: ModelSpec, precision: str) -> StepWeights:
    """Least bytes of a peer's precision: its matrices at their nominal width."""
    layer, head = NOMINAL_BYTES[precision]
    count = model.num_layers * _layer_weights(model)
    return StepWeights(
        dense=round(count * layer + model.vocab_size * model.hidden_size * head), per_row=0
    )


def cache_bytes_per_step(
    model: ModelSpec, *, itemsize: int, batch: int, depth: int, steps: int = 1
) -> float:
    """Bytes of keys and values that a step reads, the mean of `steps` steps.

    Args:
        model: the architecture.
        itemsize: bytes of a cache element.
        batch: number of sequences.
        depth: positions in the cache before the first step.
        steps: number of steps; step `i` attends to `depth + i + 1` positions, its own included.
    """
    position = 2 * model.num_heads * model.head_dim * itemsize
    return position * batch * sum(_attended(model, depth + i + 1) for i in range(steps)) / steps


def decode_flops(model: ModelSpec, *, batch: int, depth: int, steps: int = 1) -> float:
    """Floating-point operations of a decode step (a multiply-add counts two), mean of `steps`."""
    matrices = _layer_weights(model) * model.num_layers + model.vocab_size * model.hidden_size
    width = model.num_heads * model.head_dim
    attended = sum(_attended(model, depth + i + 1) for i in range(steps)) / steps
    # Each attended position needs a product with the query, and one of its value and weight.
    return batch * (2.0 * matrices + 4.0 * width * attended)


def prefill_flops(model: ModelSpec, *, batch: int, length: int) -> float:
    """Least number of operations for a prompt with an empty cache.

    The last layer computes keys and values for every position; the rest of it, and the head, only
    for the last position.
    """
    width = model.num_heads * model.head_dim
    before = replace(model, attention_layers=model.attention_layers[:-1])
    attended = sum(_attended(before, position + 1) for position in range(length))
    attended += _attended(model, length) - _attended(before, length)
    cached = 2 * model.hidden_size * width
    matrices = _layer_weights(model) * (model.num_layers - 1) * length
    matrices += cached * length + _layer_weights(model) - cached
    head = model.vocab_size * model.hidden_size
    return batch * (2.0 * (matrices + head) + 4.0 * width * attended)


def _layer_weights(model: ModelSpec) -> int:
    """Elements of a layer's matrices: q, k, v, out, and the two of the MLP."""
    width = model.num_heads * model.head_dim
    return 4 * model.hidden_size * width + 2 * model.hidden_size * model.intermediate_size


def _attended(model: ModelSpec, positions: int) -> int:
    """Positions that a query at the end of that many attends to, summed over all layers."""
    return sum(
        min(positions, model.window_size) if kind == "local" else positions
        for kind in model.attention_layers
    )
