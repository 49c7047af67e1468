"""Logits only of the positions that are asked for: one graph for prompts and for scoring.

    before                              after
    hidden [B, S, H] → head → [B, S, V]  GatherND(hidden, logit_positions [B, M]) → head → [B, M, V]

`logit_positions` becomes an input: indices among the new tokens, of each row. A prompt wants
its last valid one, scoring all of them, and a vocabulary times the positions is what is saved.
Must not fire on a graph that takes one token at a time, or that has chosen its positions already.
"""

from __future__ import annotations

import onnx_ir as ir

from neo_export.model import place_name
from neo_export.passes._insert import insert_before
from neo_export.passes._tensors import logits_of

__all__ = ["select_logits"]

_POSITIONS = "logit_positions"
_SELECTED = "logits_sequence"


def select_logits(model: ir.Model) -> int:
    """Apply to the whole model; returns 1, or 0 where the logits are not those of all positions."""
    graph = model.graph
    logits, vocabulary = logits_of(graph)
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    assert logits.shape is not None
    assert ids.shape is not None
    if isinstance(ids.shape[1], int) or logits.shape[1] != ids.shape[1]:
        return 0
    name = place_name(None, "final_norm")
    hidden = next(v for node in graph for v in node.outputs if v.name == name)
    readers = list(hidden.uses())
    positions = ir.Value(
        name=_POSITIONS,
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([ids.shape[0], _SELECTED]),
    )
    names = [value.name for value in graph.inputs]
    graph.inputs.insert(names.index("position_ids") + 1, positions)
    readers_in_order = {use.node for use in readers}
    (selected,) = insert_before(
        next(node for node in graph if node in readers_in_order),
        "selected",
        lambda op: (op.GatherND(hidden, op.Unsqueeze(positions, [2]), batch_dims=1),),
    )
    selected.name = "selected_hidden"
    selected.type, selected.shape = hidden.type, None
    for use in readers:
        use.node.replace_input_with(use.idx, selected)
    logits.shape = ir.Shape([logits.shape[0], _SELECTED, vocabulary])
    return 1
