"""Inserts new nodes into a graph that is already built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
from onnxscript import GraphBuilder

if TYPE_CHECKING:
    from collections.abc import Callable

    from onnxscript import OpBuilder

__all__ = ["insert_before"]


def insert_before(
    node: ir.Node, scope: str, build: Callable[[OpBuilder], tuple[ir.Value, ...]]
) -> tuple[ir.Value, ...]:
    """Insert the nodes that `build` writes before `node`; returns what `build` returns.

    They are written into a scratch graph first: each builder starts its own numbering of
    constants, and their names would collide with existing ones. `scope` prefixes every new name
    except those of the returned values.
    """
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    scratch = ir.Graph([], [], nodes=[], opset_imports=dict(graph.opset_imports), name=scope)
    results = build(GraphBuilder(scratch).op)
    for name, constant in list(scratch.initializers.items()):
        del scratch.initializers[name]
        constant.name = f"{scope}.{name}"
        graph.register_initializer(constant)
    nodes = list(scratch)
    for new in nodes:
        if new.name is not None and new.name.startswith(f"{new.op_type}_node_"):
            new.name = f"{scope}.{new.name}"
        for value in new.outputs:
            value.name = value.name if value in results else f"{scope}.{value.name}"
    scratch.remove(nodes)
    graph.insert_before(node, nodes)
    return results
