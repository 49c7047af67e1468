"""As many rows of the head's matrix as a GPU's kernels want.

    before                               after
    logits = Gemm(x, table, transB=1)    logits = Slice(Gemm(x, table and rows of zeros, transB=1))
    logits = MatMulNBits(x, w, scales)   the same, with rows of zeros in both

GPT-2's vocabulary of 50,257 is odd. CUDA's int4 kernel for one token takes multiples of 8 and
otherwise unpacks all of the table first, and cuBLAS has no fast kernel for odd widths of several
rows. The embedding reads the same stored table, whose new rows no token names.
Must run when the weights have the form in which they are stored; must not fire for a table in
float32, which is the checkpoint's own, nor where the vocabulary is a multiple already.
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
"""Rows: what the widest tile of the kernels is."""


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
    """The product that the logits are the result of, in another type and shape."""
    node = logits.producer()
    while node is not None and node.op_type in ("Cast", "Reshape"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None:
        raise ValueError("no operator gives the logits")
    return node


def _is_table(value: ir.Value, rows: int) -> bool:
    """Whether a pass stores it; a table in float32 is the checkpoint's own, and stays as it is."""
    return value.const_value is not None and static_shape(value)[0] == rows


def _cut(product: ir.Value, vocabulary: int, rows: int) -> None:
    """Leave the new columns out of what is read."""
    (user,) = product.uses()
    (short,) = insert_before(
        user.node, "pad_head", lambda op: (op.Slice(product, [0], [vocabulary], [-1]),)
    )
    assert product.shape is not None
    short.name, short.type, short.shape = "pad_head.short", product.type, product.shape
    product.shape = ir.Shape([*product.shape[:-1], rows])
    user.node.replace_input_with(user.idx, short)


def _grow(value: ir.Value, rows: int) -> None:
    """Append rows of zeros to an initializer, when it is read."""
    tensor = value.const_value
    assert tensor is not None
    _replace(value, rows, lambda: _padded(tensor, rows))


def _follow(alias: ir.Value, value: ir.Value, rows: int) -> None:
    """An initializer over the bytes of one that has grown has its rows."""
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
