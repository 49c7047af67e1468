"""The pattern of attention and its cache as the model writes them, for passes that replace it."""

from __future__ import annotations

from typing import Any

from neo_export.passes._rule import Rule

__all__ = ["AttentionRule"]


class AttentionRule(Rule):
    """Matches from the projections' outputs to the merged heads and the present key and value."""

    def pattern(
        self,
        op: Any,
        query: Any,
        key: Any,
        value: Any,
        past_key: Any,
        past_value: Any,
        mask: Any,
        split: Any,
        merge: Any,
        lowest: Any,
    ) -> Any:
        heads = op.Cast(op.Transpose(op.Reshape(query, split), perm=[0, 2, 1, 3]), to=1)
        present_key = op.Concat(
            past_key, op.Transpose(op.Reshape(key, split), perm=[0, 2, 1, 3]), axis=2
        )
        present_value = op.Concat(
            past_value, op.Transpose(op.Reshape(value, split), perm=[0, 2, 1, 3]), axis=2
        )
        scores = op.MatMul(heads, op.Transpose(op.Cast(present_key, to=1), perm=[0, 1, 3, 2]))
        weights = op.Softmax(op.Where(mask, scores, lowest), axis=-1)
        attended = op.MatMul(op.CastLike(weights, present_value), present_value)
        merged = op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), merge)
        return merged, present_key, present_value
