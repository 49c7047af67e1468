"""Folds the bias of a product into the operator that adds the residual and normalizes.

    before                                          after
    y = Add(product, bias)
    SkipLayerNormalization(y, x, γ, β)              SkipLayerNormalization(product, x, γ, β, bias)

onnxruntime does the same when it loads a graph, but only after `MatMul`. After the product of a
quantized weight, the sum would stay a kernel of its own: two per layer and token.

`y` is a place that tools inspect, and the graph no longer computes it. Its name is kept in the
operator's metadata, and `hidden_sums` returns the two values that it is the sum of. Must not fire
where something else reads `y`, or where the bias is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_export.passes._tensors import is_parameter

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["fold_bias", "hidden_sums"]

_SUM_KEY = "neo.sum"
"""Metadata of the operator: the name of the sum of its first input and its bias."""
_BIAS = 4  # place among the operator's inputs


def fold_bias(model: ir.Model) -> int:
    """Apply to the whole model; returns how many additions were folded."""
    nodes = [node for node in model.graph if node.op_type == "SkipLayerNormalization"]
    return sum(_fold(node) for node in nodes if len(node.inputs) == _BIAS)


def hidden_sums(graph: ir.Graph) -> dict[str, tuple[ir.Value, ir.Value]]:
    """Name of each value that the pass removed from a graph → product and bias."""
    found = {}
    for node in graph:
        if name := node.metadata_props.get(_SUM_KEY):
            product, bias = node.inputs[0], node.inputs[_BIAS]
            assert product is not None
            assert bias is not None
            found[name] = product, bias
    return found


def _fold(norm: ir.Node) -> bool:
    for place in (0, 1):
        total = norm.inputs[place]
        parts = _product_and_bias(total)
        if total is not None and parts is not None:
            break
    else:
        return False
    product, bias = parts
    add, graph = total.producer(), norm.graph
    assert add is not None
    assert graph is not None
    norm.replace_input_with(place, norm.inputs[0])
    norm.replace_input_with(0, product)
    norm.resize_inputs(_BIAS + 1)
    norm.replace_input_with(_BIAS, bias)
    norm.metadata_props[_SUM_KEY] = str(total.name)
    graph.remove(add, safe=True)
    return True


def _product_and_bias(total: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    add = total.producer() if total is not None else None
    if total is None or add is None or add.op_type != "Add":
        return None
    if len(total.uses()) != 1 or total.is_graph_output():
        return None
    for product, bias in (add.inputs, reversed(add.inputs)):
        if product is None or bias is None or is_parameter(product) or not is_parameter(bias):
            continue
        if bias.shape is not None and len(bias.shape) == 1:
            return product, bias
    return None
