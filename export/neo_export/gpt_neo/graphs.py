"""The entry points: separate graphs over the same parameters.

They differ in the positions whose logits they return:

    prefill     the last valid new position of each row
    decode      the only new position
    score       every new position
    selective   the positions in `logit_positions`, for prompts and for scoring

In prefill's last layer, all other positions get keys and values, but nothing after attention.
Selective selects only after the final norm. If one layer processed fewer rows than the others,
TensorRT would store its weights twice, in a layout for each of its profiles.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnxscript import GraphBuilder

from neo_export.gpt_neo.model import WINDOW_KEY, CausalLM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_runtime.bundle.manifest import ModelSpec
    from onnxscript import OpBuilder

    from neo_export.gpt_neo.model import Select

__all__ = ["GRAPH_NAMES", "OPSET", "build_graph", "drop_builder_notes"]

GRAPH_NAMES = ("prefill", "decode", "score")
OPSET = 18
"""LayerNormalization needs opset 17; every runtime in use supports 18.

Passes may raise it."""
IR_VERSION = 10
_SELECTED = "logits_sequence"


def drop_builder_notes(graph: ir.Graph) -> None:
    """Remove the provenance metadata that onnxscript adds to nodes: a third of a graph's bytes."""
    for node in graph:
        for key in list(node.metadata_props):
            if key == "namespace" or key.startswith("pkg.onnxscript."):
                del node.metadata_props[key]


def build_graph(name: str, spec: ModelSpec) -> ir.Model:
    """Write the graph `name` ("prefill", "decode", "score" or "selective") in standard operators.

    Its parameters are initializers without data, under the checkpoint's names. Inputs: input_ids,
    attention_mask and position_ids (int64 [B, S], [B, T], [B, S]), selective's logit_positions
    (int64 [B, M], indices among the new tokens) and past_key_values.{i}.key and .value (float32
    [B, N, P, D]). Outputs: logits (float32 [B, 1, V], score: [B, S, V], selective: [B, M, V]) and
    present.{i}.key and .value ([B, N, T, D]).
    """
    return _built(name, spec).clone()


@lru_cache(maxsize=16)
def _built(name: str, spec: ModelSpec) -> ir.Model:
    """The cached original of the graph; a plan search exports one model many times."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=name)
    op = GraphBuilder(graph).op
    sequence: int | str = 1 if name == "decode" else "sequence"
    input_ids = _input(op, "input_ids", ir.DataType.INT64, ["batch", sequence])
    attention_mask = _input(op, "attention_mask", ir.DataType.INT64, ["batch", "total_sequence"])
    position_ids = _input(op, "position_ids", ir.DataType.INT64, ["batch", sequence])
    if name == "selective":
        wanted = _input(op, "logit_positions", ir.DataType.INT64, ["batch", _SELECTED])
    past_shape: list[int | str] = ["batch", spec.num_heads, "past_sequence", spec.head_dim]
    past = [
        (
            _input(op, f"past_key_values.{i}.key", ir.DataType.FLOAT, past_shape),
            _input(op, f"past_key_values.{i}.value", ir.DataType.FLOAT, past_shape),
        )
        for i in range(spec.num_layers)
    ]
    for kind, pair in zip(spec.attention_layers, past, strict=True):
        for value in pair:
            value.metadata_props[WINDOW_KEY] = str(spec.window_size if kind == "local" else -1)
    model = CausalLM(spec)
    select, rows = None, sequence
    if name == "prefill":
        select, rows = _at(op, _last_valid(op, input_ids, attention_mask)), 1
    hidden, present = model(op, input_ids, attention_mask, position_ids, past, select)
    if name == "selective":
        hidden, rows = _at(op, wanted)(hidden), _SELECTED
    logits = model.logits(op, hidden)
    _output(graph, logits, "logits", ["batch", rows, spec.vocab_size])
    present_shape: list[int | str] = ["batch", spec.num_heads, "present_sequence", spec.head_dim]
    for i, (key, value) in enumerate(present):
        _output(graph, key, f"present.{i}.key", present_shape)
        _output(graph, value, f"present.{i}.value", present_shape)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="neo-onnx")


def _at(op: OpBuilder, positions: ir.Value) -> Select:
    """A function that selects the positions [B, M] from [B, S, H]."""
    indices = op.Unsqueeze(positions, [2])
    return lambda hidden: op.GatherND(hidden, indices, batch_dims=1)


def _last_valid(op: OpBuilder, input_ids: ir.Value, attention_mask: ir.Value) -> ir.Value:
    """Index of each row's last new position that is not masked: [B, 1]."""
    new = op.Shape(input_ids, start=1, end=2)
    total = op.Shape(attention_mask, start=1, end=2)
    valid = op.Slice(attention_mask, op.Sub(total, new), total, [1])
    valid = op.Cast(op.Cast(valid, to=ir.DataType.BOOL), to=ir.DataType.INT64)
    slots = op.Range(0, op.Squeeze(new), 1)
    return op.ReduceMax(op.Mul(valid, slots), [1], keepdims=1)


def _input(op: OpBuilder, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    op.builder.graph.inputs.append(value)
    return value


def _output(graph: ir.Graph, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
    value.name = name
    value.type = ir.TensorType(ir.DataType.FLOAT)
    value.shape = ir.Shape(shape)
    graph.outputs.append(value)
