"""Half precision: weights, activations and cache become float16, scores and logits stay float32.

`bfloat16` does the same with bfloat16, which has 8 bits of precision and all of float32's range.

    before                     after
    every float32 tensor       float16, except what is computed from an explicit Cast to float32:
                               in the standard-operator form the attention scores (the model
                               casts q and k, as the reference does), and the logits

Types are propagated forward from the graph's inputs: a Cast decides its own output, every other
node computes in the type of its first floating-point input, and constants follow the node that
reads them. A weight that float16 cannot hold (beyond ±65504) is an error when it is written; it is
never clipped.

`float16` keeps some tensors in float32: see `neo_export.passes._wide`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from neo_runtime.errors import CheckpointError

from neo_export.passes._tensors import add_lazy_initializer, read, static_shape
from neo_export.passes._wide import Wide, unify_inputs
from neo_export.quantize.half import fits_float16

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_export.passes import Pass

__all__ = ["bfloat16", "float16", "to_bfloat16", "to_float16"]

_FLOAT = ir.DataType.FLOAT
_STATISTICS = {"SkipLayerNormalization": (1, 2)}
"""Outputs (mean, inverse standard deviation) that the operator always defines as float32."""


def to_float16(values: NDArray[np.float32], name: str) -> NDArray[np.float16]:
    """Round to nearest even.

    Raises:
        CheckpointError: a value is beyond what float16 holds.
    """
    if not fits_float16(values):
        largest = np.abs(values).max()
        raise CheckpointError(
            f"{name} holds ±{largest:.6g}, float16 at most 65504; export with --fp16 "
            "--calibrate-text FILE, which keeps what float16 cannot hold in float32, or with "
            "--target cpu --fp32"
        )
    return values.astype(np.float16)


def to_bfloat16(values: NDArray[np.float32], name: str) -> NDArray[Any]:
    """Round to nearest even: ml_dtypes.bfloat16.

    Raises:
        CheckpointError: a value rounds to infinity.
    """
    import ml_dtypes

    with np.errstate(over="ignore"):
        halves: NDArray[Any] = values.astype(ml_dtypes.bfloat16)
    if np.isinf(halves.astype(np.float32)).any():
        raise CheckpointError(
            f"{name} holds numbers beyond the range of bfloat16; export with --target cpu --fp32"
        )
    return halves


def float16(wide: Wide) -> Pass:
    """The pass for all tensors but those in `wide`, which stay float32."""

    def float16(model: ir.Model) -> int:
        """Apply to the whole model; returns how many weights became float16."""
        return _to_half(model, ir.DataType.FLOAT16, wide)

    return float16


def bfloat16(model: ir.Model) -> int:
    """Apply to the whole model; returns how many weights became bfloat16."""
    return _to_half(model, ir.DataType.BFLOAT16, Wide())


def _to_half(model: ir.Model, half: ir.DataType, wide: Wide) -> int:
    graph = model.graph
    for value in graph.inputs:
        if value.dtype == _FLOAT:
            value.type = ir.TensorType(half)
    halves: dict[str, ir.Value] = {}
    for node in list(graph):
        dtype = wide.computes_in(node, half) or _computes_in(node, half)
        if wide and dtype is not None:
            unify_inputs(graph, node, dtype)
        if dtype == half:
            _halve_parameters(graph, node, halves, half)
        statistics = _STATISTICS.get(node.op_type, ())
        for index, output in enumerate(node.outputs):
            if dtype is not None and output.dtype in (_FLOAT, None):
                output.type = ir.TensorType(_FLOAT if index in statistics else dtype)
        if wide:
            wide.narrow_places(graph, node, half)
    for name in [n for n, v in graph.initializers.items() if v.dtype == _FLOAT and not v.uses()]:
        del graph.initializers[name]
    return sum(name.startswith(("transformer", "lm_head")) for name in halves)


def _computes_in(node: ir.Node, half: ir.DataType) -> ir.DataType | None:
    """Type of the node's floating-point outputs; None if it has no floating-point input."""
    if node.op_type == "Cast":
        return ir.DataType(node.attributes.get_int("to"))
    if node.op_type == "CastLike":
        like = node.inputs[1]
        return like.dtype if like is not None else None
    computed = [v for v in node.inputs if v is not None and not v.is_initializer()]
    floating = [v.dtype for v in computed if v.dtype in (_FLOAT, half)]
    if floating:
        return floating[0]
    stored = [v for v in node.inputs if v is not None and v.is_initializer() and v.dtype == _FLOAT]
    return half if stored else None


def _halve_parameters(
    graph: ir.Graph, node: ir.Node, halves: dict[str, ir.Value], half: ir.DataType
) -> None:
    """Replace every float32 initializer that the node reads by its copy in half precision."""
    for index, value in enumerate(node.inputs):
        if value is None or not value.is_initializer() or value.dtype != _FLOAT:
            continue
        assert value.name is not None
        if value.name not in halves:
            halves[value.name] = _half(graph, value, half)
        node.replace_input_with(index, halves[value.name])


def _half(graph: ir.Graph, value: ir.Value, half: ir.DataType) -> ir.Value:
    convert = to_float16 if half == ir.DataType.FLOAT16 else to_bfloat16
    return add_lazy_initializer(
        graph,
        f"{value.name}.{half.name.lower()}",
        lambda: convert(read(value), str(value.name)),
        dtype=half,
        shape=static_shape(value),
    )
