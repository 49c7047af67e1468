"""Pads the rows of the head's matrix to a multiple that suits a GPU's kernels.

    before                               after
    logits = Gemm(x, table, transB=1)    logits = Slice(Gemm(x, table and rows of zeros, transB=1))
    logits = MatMulNBits(x, w, scales)   the same, with rows of zeros in both

GPT-2's vocabulary of 50,257 is odd. onnxruntime's int4 CUDA kernel for one token needs a multiple
of 8, otherwise the whole table is unpacked first; for several rows, cuBLAS has no fast kernel for
odd widths. The embedding reads the same stored table; no token id refers to the new rows.
Must run after the passes that decide how the weights are stored. Must not fire for a table in
float32, which is the checkpoint's own, or when the vocabulary is a multiple already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from neo_export.passes._insert import insert_before
from neo_export.passes._tensors import ALIAS_KEY, lazy_tensor, logits_of, read, static_shape

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["MULTIPLE", "pad_head"]

MULTIPLE = 64
"""The rows are padded to a multiple of this, the width of the kernels' widest tile."""


def pad_head(model: ir.Model) -> int:
    """Apply to the whole model; returns how many stored tensors grew."""
    graph = model.graph
    logits, vocabulary = logits_of(graph)
    rows = -(-vocabulary // MULTIPLE) * MULTIPLE
    head = _product(logits)
    stored = [v for v in head.inputs if v is not None and _is_table(v, vocabulary)]
    if rows == vocabulary or not stored:
        return 0
    for value in stored:
        _grow(value, rows)
    for alias in graph.initializers.values():
        for value in stored:
            if alias.metadata_props.get(ALIAS_KEY) == value.name:
                _follow(alias, value, rows)
    if "N" in head.attributes:
        head.attributes["N"] = ir.AttrInt64("N", rows)
    _cut(head.outputs[0], vocabulary, rows)
    return len(stored)


def _product(logits: ir.Value) -> ir.Node:
    """The product that computes the logits, before casts and reshapes."""
    node = logits.producer()
    while node is not None and node.op_type in ("Cast", "Reshape"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None:
        raise ValueError("no operator gives the logits")
    return node


def _is_table(value: ir.Value, rows: int) -> bool:
    """Whether a pass stores the value; the checkpoint's own float32 table has no data here."""
    return value.const_value is not None and static_shape(value)[0] == rows


def _cut(product: ir.Value, vocabulary: int, rows: int) -> None:
    """Slice the padded columns off the product for its reader."""
    (user,) = product.uses()
    (short,) = insert_before(
        user.node, "pad_head", lambda op: (op.Slice(product, [0], [vocabulary], [-1]),)
    )
    assert product.shape is not None
    short.name, short.type, short.shape = "pad_head.short", product.type, product.shape
    product.shape = ir.Shape([*product.shape[:-1], rows])
    user.node.replace_input_with(user.idx, short)


def _grow(value: ir.Value, rows: int) -> None:
    """Append rows of zeros to an initializer, lazily."""
    tensor = value.const_value
    assert tensor is not None
    _replace(value, rows, lambda: _padded(tensor, rows))


def _follow(alias: ir.Value, value: ir.Value, rows: int) -> None:
    """Give an alias of a padded initializer the same number of rows."""
    shape = (rows, *static_shape(alias)[1:])
    _replace(alias, rows, lambda: read(value).reshape(shape))


def _replace(value: ir.Value, rows: int, make: Callable[[], NDArray[Any]]) -> None:
    assert value.dtype is not None
    shape = (rows, *static_shape(value)[1:])
    value.shape = ir.Shape(shape)
    value.const_value = lazy_tensor(str(value.name), make, dtype=value.dtype, shape=shape)


def _padded(tensor: ir.TensorProtocol, rows: int) -> NDArray[Any]:
    found = tensor.numpy()
    padded = np.zeros((rows, *found.shape[1:]), found.dtype)
    padded[: len(found)] = found
    return padded
