"""Quantizes rows of activations in one operator instead of two.

    before                                          after
    QuantizeLinear(x / row, 1/127, 128)             QuantizeLinear(x, row · 1/127, zeros,
                                                        axis=-1, block_size=width of x)

A block is a whole row, with the row's scale. For many rows this saves one read and one write of
the activations: up to 4 % of a prompt of the 1.3B shape (docs/design/cpu.md). For one row it would
gain nothing and add the zero points (all 128), which must have the shape of the scales.

Must not fire where x has one row per sequence: in decode, at last positions, in the head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from neo_export.passes._insert import insert_before

if TYPE_CHECKING:
    from onnxscript import OpBuilder

__all__ = ["quantize_rows"]

_OPSET = 21  # the first with blocks


def quantize_rows(model: ir.Model) -> int:
    """Apply to the whole model; returns how many activations are quantized in blocks."""
    graph = model.graph
    input_ids = next((value for value in graph.inputs if value.name == "input_ids"), None)
    if input_ids is None or input_ids.shape is None or input_ids.shape[1] == 1:
        return 0
    found = [(node, divide) for node in graph if (divide := _divide(node)) is not None]
    if not found:
        return 0
    graph.opset_imports[""] = max(_OPSET, graph.opset_imports[""])
    zero = found[0][0].inputs[2]
    assert zero is not None
    (zeros,) = insert_before(graph[0], "int8.zeros", lambda op: _zeros(op, input_ids, zero))
    for node, divide in found:
        _in_blocks(node, divide, zeros)
    return len(found)


def _divide(node: ir.Node) -> ir.Node | None:
    """The division before this node, if it quantizes many rows for an integer product."""
    if node.op_type != "QuantizeLinear" or node.inputs[0] is None:
        return None
    if {use.node.op_type for use in node.outputs[0].uses()} != {"MatMulIntegerToFloat"}:
        return None
    divide = node.inputs[0].producer()
    if divide is None or divide.op_type != "Div" or divide.inputs[0] is None:
        return None
    shape = divide.inputs[0].shape
    if shape is None or len(shape) != 3 or shape[1] == 1 or not isinstance(shape[2], int):
        return None
    return divide


def _zeros(op: OpBuilder, input_ids: ir.Value, zero: ir.Value) -> tuple[ir.Value]:
    """The zero point of every row, [batch, sequence, 1]."""
    zeros = op.Expand(zero, op.Concat(op.Shape(input_ids), [1], axis=0))
    zeros.name = "int8.zeros"
    return (zeros,)


def _in_blocks(node: ir.Node, divide: ir.Node, zeros: ir.Value) -> None:
    (x, row), step = divide.inputs, node.inputs[1]
    assert x is not None
    assert x.shape is not None
    width = x.shape[2]
    assert isinstance(width, int)
    name = f"{node.outputs[0].name}.scale"
    (scale,) = insert_before(node, name, lambda op: (op.Mul(row, step),))
    scale.name = name
    for place, value in enumerate((x, scale, zeros)):
        node.replace_input_with(place, value)
    node.attributes["axis"] = ir.AttrInt64("axis", -1)
    node.attributes["block_size"] = ir.AttrInt64("block_size", width)
    if not divide.outputs[0].uses() and node.graph is not None:
        node.graph.remove(divide, safe=True)
