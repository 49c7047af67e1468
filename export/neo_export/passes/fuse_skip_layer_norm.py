"""Fuses a residual addition and the layer norm after it into one operator.

    before                                   after
    sum = Add(a, b)                          norm, _, _, sum = SkipLayerNormalization(a, b, γ, β)
    norm = LayerNormalization(sum, γ, β)

The sum (the residual stream) stays an output under its own name, for the next addition and for
the tools. Must not fire when one addend is broadcast: the operator requires equal shapes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neo_export.passes._rule import MatchResult, Rule, apply
from neo_export.passes._tensors import is_parameter

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["fuse_skip_layer_norm"]


class _SkipLayerNorm(Rule):
    def pattern(self, op: Any, a: Any, b: Any, gamma: Any, beta: Any) -> Any:
        total = op.Add(a, b)
        norm = op.LayerNormalization(
            total, gamma, beta, axis=-1, _outputs=["norm"], _allow_other_attributes=True
        )
        return norm, total

    def check(self, context: Any, a: ir.Value, b: ir.Value, **_: Any) -> MatchResult:
        result = MatchResult()
        for addend in (a, b):
            if is_parameter(addend) or addend.shape is None or len(addend.shape) != 3:
                return result.fail("an addend is not [batch, sequence, hidden]", addend)
        assert a.shape is not None
        assert b.shape is not None
        if any(_known(m) and _known(n) and m != n for m, n in zip(a.shape, b.shape, strict=True)):
            return result.fail(f"the addends differ in shape: {a.shape} and {b.shape}")
        return result

    def rewrite(
        self, op: Any, a: ir.Value, b: ir.Value, gamma: ir.Value, beta: ir.Value, norm: ir.Value
    ) -> Any:
        node = norm.producer()
        assert node is not None
        fused, _mean, _deviation, total = op.SkipLayerNormalization(
            a,
            b,
            gamma,
            beta,
            epsilon=node.attributes.get_float("epsilon", 1e-5),
            _domain="com.microsoft",
            _outputs=4,
        )
        return fused, total


def _known(size: int | ir.SymbolicDim) -> bool:
    """Whether a size is known: shape inference loses the sequence's name at attention's Reshape."""
    return isinstance(size, int) or size.value is not None


def fuse_skip_layer_norm(model: ir.Model) -> int:
    """Apply to the whole model; returns how many norms were fused."""
    return apply(_SkipLayerNorm, model)
