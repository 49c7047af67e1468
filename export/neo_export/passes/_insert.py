"""New nodes at the head of a graph that is already built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
from onnxscript import GraphBuilder

if TYPE_CHECKING:
    from collections.abc import Callable

    from onnxscript import OpBuilder

__all__ = ["insert_at_head"]


def insert_at_head(
    graph: ir.Graph, scope: str, build: Callable[[OpBuilder], tuple[ir.Value, ...]]
) -> tuple[ir.Value, ...]:
    """Put what `build` writes before the first node; returns what `build` returns.

    It is written into a scratch graph first: a builder names its constants afresh, and they would
    collide with those that are there. `scope` goes before every new name that `build` left alone.
    """
    scratch = ir.Graph([], [], nodes=[], opset_imports=dict(graph.opset_imports), name=scope)
    results = build(GraphBuilder(scratch).op)
    for name, constant in list(scratch.initializers.items()):
        del scratch.initializers[name]
        constant.name = f"{scope}.{name}"
        graph.register_initializer(constant)
    nodes = list(scratch)
    for node in nodes:
        for value in node.outputs:
            value.name = value.name if value in results else f"{scope}.{value.name}"
    scratch.remove(nodes)
    graph.insert_before(graph[0], nodes)
    return results
