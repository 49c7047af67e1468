"""Quantizes keys and values to int8, in the cache and in every product with them.

    before                             after, decode (one new token)
    y, pk, pv = GroupQueryAttention(   y', pk, pv = GroupQueryAttention(qkv · in, int8 pasts,
        qkv, past_key, past_value, …)      …, 1, 1, k_quant_type=v_quant_type=PER_TENSOR)
                                       y = y' · out

                                       after, prefill and score (many)
                                       q, k, v = Split(qkv · in)
                                       y', a, b = GroupQueryAttention(q, int8(k), int8(v),
                                           Cast(past_key), Cast(past_value), …)
                                       y = y' · out;  pk = QuantizeLinear(a);  pv = …(b)

Every key and value channel has a quantization step. `in` [3·hidden] multiplies a query's channel
by the step of its key's channel, and divides keys and values by their own steps. The cache then
holds plain integers, and the operator needs no scales (they are 1). `out` [hidden] multiplies the
attention's output by the steps of the values. Scores do not change, and the operator's kernels run
faster with one scale per tensor than with one per channel.

In decode the operator itself reads int8: a quarter of the bytes. For several queries that kernel
takes three to five times as long as the float32 one (it multiplies row by row), so prefill and
score convert the integers to float32 first. All graphs use the same integers: prefill and score,
too, round new keys and values before attention, so scoring measures what generation does.

Must not fire on attention that is not the fused operator over float32 caches.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from neo_export.passes._insert import insert_before
from neo_export.passes._tensors import add_initializer, add_lazy_initializer

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from onnxscript import OpBuilder

    from neo_export.passes import Pass
    from neo_export.quantize.kv_cache import CacheSteps

__all__ = ["cache_factors", "quantize_cache_steps"]

_QKV, _KEY, _VALUE, _PAST_KEY, _PAST_VALUE = range(5)
_INPUT_NAMES = ("query", "key", "value", "past_key", "past_value")
_KEY_SCALE, _VALUE_SCALE = 12, 13
_INTEGER = ir.TensorType(ir.DataType.INT8)


def quantize_cache_steps(steps: CacheSteps, *, single: bool) -> Pass:
    """The pass for one graph of a bundle.

    Args:
        steps: the quantization steps of this model.
        single: whether the graph takes one new token per row (decode).
    """

    def quantize_cache(model: ir.Model) -> int:
        fired = 0
        for node in list(model.graph):
            if node.op_type == "GroupQueryAttention" and _has_float_cache(node):
                _quantize(node, steps, single=single)
                fired += 1
        return fired

    return quantize_cache


def _has_float_cache(node: ir.Node) -> bool:
    """Whether the operator keeps float32 keys and values."""
    past = node.inputs[_PAST_KEY]
    return past is not None and past.is_graph_input() and past.dtype == ir.DataType.FLOAT


def _quantize(node: ir.Node, steps: CacheSteps, *, single: bool) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    past_key, past_value = node.inputs[_PAST_KEY], node.inputs[_PAST_VALUE]
    assert past_key is not None
    assert past_value is not None
    assert past_key.name is not None
    layer = int(past_key.name.split(".")[1])
    key, value = steps.key[layer], steps.value[layer]
    into_name, out_name = cache_factors(layer)
    into = _factors(graph, into_name, partial(_into_steps, key, value), 3 * len(key))
    out = _factors(graph, out_name, lambda: value, len(value))
    for past in (past_key, past_value):
        past.type = _INTEGER
    if single:
        _in_the_operator(node, layer, into)
    else:
        _widened(node, layer, into)
    _scale_output(node, out)


def cache_factors(layer: int) -> tuple[str, str]:
    """Names of a layer's initializers `in` and `out`, float32 [3·hidden] and [hidden].

    The first third of `in` is the steps of the keys; `out` is the steps of the values.
    """
    prefix = f"transformer.h.{layer}.attn.attention.cache"
    return f"{prefix}.in", f"{prefix}.out"


def _into_steps(key: NDArray[np.float32], value: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([key, np.float32(1) / key, np.float32(1) / value])


def _factors(
    graph: ir.Graph, name: str, make: Callable[[], NDArray[np.float32]], size: int
) -> ir.Value:
    return add_lazy_initializer(graph, name, make, dtype=ir.DataType.FLOAT, shape=(size,))


def _packed(op: OpBuilder, node: ir.Node) -> ir.Value:
    """Queries, keys and values side by side, [B, S, 3·hidden]."""
    query, key, value = node.inputs[_QKV : _VALUE + 1]
    if key is None:
        assert query is not None
        return query
    packed: ir.Value = op.Concat(query, key, value, axis=-1)
    return packed


def _in_the_operator(node: ir.Node, layer: int, into: ir.Value) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)

    def write(op: OpBuilder) -> tuple[ir.Value]:
        return (op.Mul(_packed(op, node), into, _outputs=[f"cache.{layer}.qkv"]),)

    (scaled,) = insert_before(node, f"cache.{layer}", write)
    for place, new in zip((_QKV, _KEY, _VALUE), (scaled, None, None), strict=True):
        node.replace_input_with(place, new)
    node.resize_inputs(max(len(node.inputs), _VALUE_SCALE + 1))
    unit = _unit(graph)
    for place in (_KEY_SCALE, _VALUE_SCALE):
        node.replace_input_with(place, unit)
    for name in ("k_quant_type", "v_quant_type"):
        node.attributes[name] = ir.AttrString(name, "PER_TENSOR")
    node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
    for present in node.outputs[1:3]:
        present.type = _INTEGER


def _widened(node: ir.Node, layer: int, into: ir.Value) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    assert into.shape is not None
    pasts = (node.inputs[_PAST_KEY], node.inputs[_PAST_VALUE])
    unit, zero = _unit(graph), _zero(graph)

    def write(op: OpBuilder) -> tuple[ir.Value, ...]:
        query, key, value = op.Split(
            op.Mul(_packed(op, node), into), axis=-1, num_outputs=3, _outputs=3
        )
        rounded = [op.QuantizeLinear(new, unit, zero) for new in (key, value)]
        widened = [op.DequantizeLinear(x, unit, zero) for x in (*rounded, *pasts)]
        for name, made in zip(_INPUT_NAMES, (query, *widened), strict=True):
            made.name = f"cache.{layer}.{name}"
        return query, *widened

    inputs = insert_before(node, f"cache.{layer}", write)
    for place, new in zip((_QKV, _KEY, _VALUE, _PAST_KEY, _PAST_VALUE), inputs, strict=True):
        node.replace_input_with(place, new)
    for present in node.outputs[1:3]:
        _narrow_output(graph, node, present, unit, zero)


def _narrow_output(
    graph: ir.Graph, node: ir.Node, present: ir.Value, unit: ir.Value, zero: ir.Value
) -> None:
    """Make the graph return `present` as int8, under the same name."""
    name = present.name
    present.name = f"{name}.float32"
    narrow = ir.Value(name=name, type=_INTEGER, shape=present.shape)
    graph.insert_after(node, ir.Node("", "QuantizeLinear", [present, unit, zero], outputs=[narrow]))
    for index, output in enumerate(graph.outputs):
        if output is present:
            graph.outputs[index] = narrow


def _scale_output(node: ir.Node, out: ir.Value) -> None:
    graph, attended = node.graph, node.outputs[0]
    assert isinstance(graph, ir.Graph)
    # The scaled value takes the name: it is what tools expect at this place.
    scaled = ir.Value(name=attended.name, type=attended.type, shape=attended.shape)
    attended.name = f"{attended.name}.in_steps"
    uses = list(attended.uses())
    graph.insert_after(node, ir.Node("", "Mul", [attended, out], outputs=[scaled]))
    for use in uses:
        use.node.replace_input_with(use.idx, scaled)


def _unit(graph: ir.Graph) -> ir.Value:
    return add_initializer(graph, "cache.unit", ir.tensor(np.float32(1)))


def _zero(graph: ir.Graph) -> ir.Value:
    return add_initializer(graph, "cache.zero", ir.tensor(np.int8(0)))
