"""onnxscript's rewrite rules, as the passes use them.

The library types the parameters of `check` and `rewrite` by position, but rules take them by the
names in their pattern. The base class is therefore `Any` here, once, which saves a type-checker
exception at every rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxscript.rewriter import pattern

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["MatchResult", "Rule", "apply"]

Rule: Any = pattern.RewriteRuleClassBase
MatchResult: Any = pattern.MatchResult


def apply(rule: Any, model: ir.Model, *arguments: Any) -> int:
    """Apply `rule(*arguments)` to the whole model; returns how often it fired."""
    return pattern.RewriteRuleSet([rule.rule(*arguments)]).apply_to_model(model)
