"""Fuses bias and `gelu_new` into one operator, or into two.

    before                                     fuse_gelu           fuse_gelu_behind_bias
    x = Add(y, bias)                           FastGelu(y, bias)   FastGelu(Add(y, bias))
    0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))

com.microsoft.FastGelu computes the same tanh approximation in one pass over memory. With a bias,
its CPU kernel allocates one more array of the result's size; for a prompt, getting those pages
from the operating system takes longer than the activation itself.
Must not fire when a constant differs (another activation), or when the bias is computed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from neo_export.passes._rule import MatchResult, Rule, apply
from neo_export.passes._tensors import constant_value, is_parameter

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["fuse_gelu", "fuse_gelu_behind_bias"]

_CONSTANTS = {"cubic": 0.044715, "root": math.sqrt(2.0 / math.pi), "half": 0.5, "one": 1.0}


class _FastGelu(Rule):
    def pattern(
        self, op: Any, y: Any, bias: Any, cubic: Any, root: Any, half: Any, one: Any
    ) -> Any:
        x = op.Add(y, bias)
        cube = op.Mul(op.Mul(x, x), x)
        inner = op.Mul(op.Add(x, op.Mul(cube, cubic)), root)
        return op.Mul(op.Mul(x, half), op.Add(op.Tanh(inner), one))

    def check(self, context: Any, bias: ir.Value, **captured: Any) -> MatchResult:
        result = MatchResult()
        if not is_parameter(bias) or bias.shape is None or len(bias.shape) != 1:
            return result.fail("the bias is not a stored vector", bias)
        for name, expected in _CONSTANTS.items():
            found = constant_value(captured[name])
            if found is None or not math.isclose(found, expected, rel_tol=1e-6):
                return result.fail(f"constant {name} is {found}, gelu_new has {expected}")
        return result

    def rewrite(self, op: Any, y: ir.Value, bias: ir.Value, **_: Any) -> Any:
        return op.FastGelu(y, bias, _domain="com.microsoft")


class _FastGeluBehindBias(_FastGelu):
    def rewrite(self, op: Any, y: ir.Value, bias: ir.Value, **_: Any) -> Any:
        return op.FastGelu(op.Add(y, bias), _domain="com.microsoft")


def fuse_gelu(model: ir.Model) -> int:
    """Apply to the whole model; returns how many activations were fused."""
    return apply(_FastGelu, model)


def fuse_gelu_behind_bias(model: ir.Model) -> int:
    """The same, with the bias added by an operator of its own."""
    return apply(_FastGeluBehindBias, model)
