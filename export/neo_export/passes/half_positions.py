"""Stores the position table in float16, which saves half of its bytes in quantized graphs.

    before                            after
    Gather(wpe, position_ids)         Cast(Gather(wpe.float16, position_ids), float32)

Positions are added to embeddings of the same magnitude, so a relative error of 2⁻¹¹ is far below
the error of int8 or int4 in the embedding. A table that float16 cannot hold stays float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from neo_export.gpt_neo.parameters import POSITIONS
from neo_export.passes._rule import MatchResult, Rule, apply
from neo_export.passes._tensors import add_lazy_initializer, is_parameter, read, static_shape
from neo_export.passes.float16 import to_float16
from neo_export.quantize.half import fits_float16

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["half_positions"]


class _HalfPositions(Rule):
    def pattern(self, op: Any, table: Any, ids: Any) -> Any:
        return op.Gather(table, ids, axis=0)

    def check(self, context: Any, table: ir.Value, **_: Any) -> Any:
        result = MatchResult()
        name = table.name or ""
        if not (is_parameter(table) and name == POSITIONS):
            return result.fail("not the position table", table)
        if not fits_float16(read(table)):
            return result.fail("float16 ends before its numbers", table)
        return result

    def rewrite(self, op: Any, table: ir.Value, ids: ir.Value, **_: Any) -> Any:
        assert table.graph is not None

        def halves() -> NDArray[Any]:
            return to_float16(read(table), str(table.name))

        stored = add_lazy_initializer(
            table.graph,
            f"{table.name}.float16",
            halves,
            dtype=ir.DataType.FLOAT16,
            shape=static_shape(table),
        )
        return op.Cast(op.Gather(stored, ids, axis=0), to=ir.DataType.FLOAT)


def half_positions(model: ir.Model) -> int:
    """Apply to the whole model; returns 1, or 0 if the table stays as it is."""
    return apply(_HalfPositions, model)
