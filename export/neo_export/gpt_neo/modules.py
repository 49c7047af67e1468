"""The generic PyTorch modules that GPT-Neo is built from, in standard ONNX operators.

Shapes: B batch, S new tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxscript import nn

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnxscript import OpBuilder

__all__ = ["Embedding", "Head", "LayerNorm", "Linear"]


class LayerNorm(nn.Module):
    """`torch.nn.LayerNorm` over the last axis."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter([size])
        self.bias = nn.Parameter([size])

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """[B, S, H] → [B, S, H]."""
        return op.LayerNormalization(x, self.weight, self.bias, axis=-1, epsilon=self.epsilon)


class Linear(nn.Module):
    """`torch.nn.Linear`: the weight is [out, in], as the checkpoint stores it."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter([outputs, inputs])
        self.bias = nn.Parameter([outputs]) if bias else None

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """[B, S, inputs] → [B, S, outputs]."""
        y = op.MatMul(x, op.Transpose(self.weight, perm=[1, 0]))
        return y if self.bias is None else op.Add(y, self.bias)


class Embedding(nn.Module):
    """`torch.nn.Embedding`."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter([rows, size])

    def forward(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
        """[B, S] → [B, S, H]."""
        return op.Gather(self.weight, ids, axis=0)


class Head(nn.Module):
    """`lm_head` of an untied checkpoint: returns its weight as stored, [V, H]."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter([rows, size])

    def forward(self, op: OpBuilder) -> ir.Value:
        """[V, H]."""
        return self.weight
