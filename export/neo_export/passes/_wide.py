"""Tensors that stay float32 ("wide") in a half-precision graph, and the casts around them.

    before                                   after, for wide weights {w} and no wide place
    y = Add(MatMul(x, Transpose(w)), b)      y32 = Add(MatMul(Cast(x, f32), Transpose(w)), b)
    z = Add(y, residual)                     z   = Add(Cast(y32, f16), residual)

A product computes in the type of its weight. The nodes after a wide product compute in float32 up
to the next product or place (`neo_export.gpt_neo.model.place_name`); there the value is cast to
half precision unless the place is wide. A sum is wide if its place or one of its inputs is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from neo_export.gpt_neo.parameters import parts_of_packed

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["MIDDLE_PLACE", "Wide", "unify_inputs"]

MIDDLE_PLACE = "middle"
"""The residual stream between attention and MLP; no value in the graph has this name."""

_FLOAT = ir.DataType.FLOAT
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_PLACE = re.compile(
    r"transformer(\.h\.\d+)?\.(embedding|query|key|value|qkv|attention|mlp|residual|final_norm)"
)


@dataclass(frozen=True)
class Wide:
    """The tensors that stay float32; by default none."""

    places: frozenset[str] = frozenset()
    """Names of places."""
    weights: frozenset[str] = frozenset()
    """Names of parameters in the checkpoint; a product or norm that reads one is float32."""

    def __bool__(self) -> bool:
        return bool(self.places or self.weights)

    def computes_in(self, node: ir.Node, half: ir.DataType) -> ir.DataType | None:
        """Type that a node must compute in; None if these tensors do not decide it."""
        if not self or node.op_type in ("Cast", "CastLike"):
            return None
        stored = [v for v in node.inputs if v is not None and v.is_initializer()]
        if any(self._is_wide(value) for value in stored):
            return _FLOAT
        if node.op_type == "Transpose" and stored:
            return half
        if node.op_type in ("MatMul", "Gemm", "Gather"):
            weight = node.inputs[0 if node.op_type == "Gather" else 1]
            if weight is not None and _is_weight(weight):
                return half if weight.is_initializer() else weight.dtype
        if node.op_type == "Add" and self.places.intersection(_sums(node)):
            return _FLOAT
        computed = (v for v in node.inputs if v is not None and not v.is_initializer())
        return _FLOAT if any(v.dtype == _FLOAT for v in computed) else None

    def narrow_places(self, graph: ir.Graph, node: ir.Node, half: ir.DataType) -> None:
        """Cast those outputs of the node that are places but not wide, for all their readers."""
        for value in list(node.outputs):
            name = value.name or ""
            if value.dtype != _FLOAT or name in self.places or not _PLACE.fullmatch(name):
                continue
            users = list(value.uses())
            cast = _cast(value, half)
            graph.insert_after(node, cast)
            for user, index in users:
                user.replace_input_with(index, cast.outputs[0])

    def _is_wide(self, value: ir.Value) -> bool:
        return not self.weights.isdisjoint(parts_of_packed(value.name or ""))


def unify_inputs(graph: ir.Graph, node: ir.Node, dtype: ir.DataType) -> None:
    """Cast the computed floating-point inputs of a node to `dtype` where their type differs."""
    if node.op_type in ("Cast", "CastLike"):
        return
    for index, value in enumerate(node.inputs):
        if value is None or value.is_initializer() or value.dtype == dtype:
            continue
        if value.dtype == _FLOAT or value.dtype in _HALVES:
            cast = _cast(value, dtype)
            graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": dtype})
    [output] = node.outputs
    output.name = f"{value.name}.{dtype.name.lower()}"
    output.type, output.shape = ir.TensorType(dtype), value.shape
    return node


def _is_weight(value: ir.Value) -> bool:
    """Whether the value is a parameter or the Transpose of one."""
    node = value.producer()
    if node is None:
        return value.is_initializer()
    source = node.inputs[0]
    return node.op_type == "Transpose" and source is not None and source.is_initializer()


def _sums(node: ir.Node) -> Iterable[str]:
    """Names of the places that the result of an addition stands for."""
    yield node.outputs[0].name or ""
    for value in node.inputs:
        name = value.name if value is not None else None
        if name is not None and (match := re.match(r"(transformer\.h\.\d+)\.attention\b", name)):
            yield f"{match[1]}.{MIDDLE_PLACE}"
