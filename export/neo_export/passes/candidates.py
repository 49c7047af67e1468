"""The best tokens, selected on the device, so that sampling copies only a few bytes.

    before                    after
    logits [B, 1, V]          logits, and
                              top_values [B, 1, K], top_ids [B, 1, K] = TopK(logits)
                              exp_sum [B, 1] = Σ exp(logits − the largest), in float64

A row of GPT-Neo's logits is 200 kB, its candidates are 1.5 kB. `neo_runtime.sampling.candidates`
says what they suffice for, and when all logits are fetched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
from neo_runtime.bundle.manifest import CANDIDATE_OUTPUTS

from neo_export.passes._insert import insert_before
from neo_export.passes._tensors import logits_of

if TYPE_CHECKING:
    from onnxscript import OpBuilder

__all__ = ["CANDIDATES", "candidates"]

CANDIDATES = 128
"""Candidates per row. Hugging Face's default top_k is 50, and ties for the last rank must fit."""


def candidates(model: ir.Model) -> int:
    """Apply to the whole model; returns 1."""
    graph = model.graph
    logits, vocabulary = logits_of(graph)
    count = min(CANDIDATES, vocabulary)
    last = graph[-1]
    # Written before the last node, then moved after the logits.
    values, ids, total = insert_before(
        last, "candidates", lambda op: _candidates(op, logits, count)
    )
    for value, name, dtype, width in zip(
        (values, ids, total),
        CANDIDATE_OUTPUTS,
        (ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.DOUBLE),
        (count, count, None),
        strict=True,
    ):
        value.name = name
        value.type = ir.TensorType(dtype)
        value.shape = ir.Shape(["batch", 1] if width is None else ["batch", 1, width])
        graph.outputs.append(value)
    graph.sort()
    return 1


def _candidates(op: OpBuilder, logits: ir.Value, count: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    values, ids = op.TopK(logits, [count], axis=-1, largest=1, sorted=1, _outputs=2)
    # Not ReduceMax: over 32 rows it took a GPU longer than all layers of the 1.3B shape.
    largest = op.Slice(values, [0], [1], [2])
    # top_p depends on this sum; in float32, 50,257 numbers could be off by 50,257 · 2⁻²⁴.
    exponentials = op.Exp(op.Sub(logits, largest))
    total = op.ReduceSum(op.Cast(exponentials, to=ir.DataType.DOUBLE), [-1], keepdims=0)
    return values, ids, total
