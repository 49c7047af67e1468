"""GPT-Neo, written once, in standard ONNX operators: the portable graph.

Read it beside `transformers/models/gpt_neo/modeling_gpt_neo.py`: modules, their order and the
names of their parameters are the same, so a parameter's name *is* the checkpoint's. Changes for
a particular target are made by `neo_export.passes`, never here.

Shapes: B batch, S new tokens ("sequence"), P cached tokens ("past_sequence"), T = P + S
("total_sequence"), H hidden size, N heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from neo_export.gpt_neo.modules import Embedding, Head, LayerNorm, Linear

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from neo_runtime.bundle.manifest import ModelSpec
    from onnxscript import OpBuilder

__all__ = ["WINDOW_KEY", "CausalLM", "Masks", "Select", "mark_place", "place_name"]

WINDOW_KEY = "neo.window"
"""Metadata of a mask or past: how many of the last positions its layer attends to, -1 for all."""

Select: TypeAlias = "Callable[[ir.Value], ir.Value]"
"""Selects from [B, S, H] the M positions that computation goes on with: [B, M, H]."""


def _every_position(x: ir.Value) -> ir.Value:
    return x


def place_name(layer: int | None, place: str) -> str:
    """Name of a value that tools inspect; it is the same after every pass and for every target."""
    prefix = "transformer" if layer is None else f"transformer.h.{layer}"
    return f"{prefix}.{place}"


def mark_place(value: ir.Value, layer: int | None, place: str) -> ir.Value:
    """Give `value` the stable name of this place."""
    value.name = place_name(layer, place)
    return value


@dataclass(frozen=True)
class Masks:
    """Which cached or new position (T) each new position (S) may attend to: bool [B, 1, S, T]."""

    causal: ir.Value
    windowed: ir.Value


class SelfAttention(nn.Module):
    """`GPTNeoSelfAttention`: scores are *not* divided by the root of the head size."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        size = spec.hidden_size
        self.layer, self.heads, self.head_dim = layer, spec.num_heads, spec.head_dim
        self.k_proj = Linear(size, size, bias=False)
        self.v_proj = Linear(size, size, bias=False)
        self.q_proj = Linear(size, size, bias=False)
        self.out_proj = Linear(size, size, bias=True)

    def _split_heads(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """[B, S, H] → [B, N, S, D]."""
        return op.Transpose(op.Reshape(x, [0, 0, self.heads, self.head_dim]), perm=[0, 2, 1, 3])

    def _merge_heads(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """[B, N, S, D] → [B, S, H]."""
        merged = op.Transpose(x, perm=[0, 2, 1, 3])
        return op.Reshape(merged, [0, 0, self.heads * self.head_dim])

    def _attend(
        self, op: OpBuilder, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value
    ) -> ir.Value:
        # Unscaled scores overflow half precision; the reference computes them in float32, too.
        query = op.Cast(query, to=ir.DataType.FLOAT)
        key = op.Cast(key, to=ir.DataType.FLOAT)
        scores = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
        scores = op.Where(mask, scores, float(np.finfo(np.float32).min))
        weights = op.Softmax(scores, axis=-1)
        return op.MatMul(op.CastLike(weights, value), value)

    def forward(
        self,
        op: OpBuilder,
        x: ir.Value,
        mask: ir.Value,
        past: tuple[ir.Value, ir.Value],
        select: Select,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        query = mark_place(self.q_proj(op, x), self.layer, "query")
        key = mark_place(self.k_proj(op, x), self.layer, "key")
        value = mark_place(self.v_proj(op, x), self.layer, "value")
        query = self._split_heads(op, query)
        key = op.Concat(past[0], self._split_heads(op, key), axis=2)
        value = op.Concat(past[1], self._split_heads(op, value), axis=2)
        attended = self._merge_heads(op, self._attend(op, query, key, value, mask))
        mark_place(attended, self.layer, "attended")
        return self.out_proj(op, select(attended)), key, value


class Attention(nn.Module):
    """`GPTNeoAttention`: only adds a level to the parameters' names."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.attention = SelfAttention(spec, layer)

    def forward(
        self,
        op: OpBuilder,
        x: ir.Value,
        mask: ir.Value,
        past: tuple[ir.Value, ir.Value],
        select: Select,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        return self.attention(op, x, mask, past, select)


class MLP(nn.Module):
    """`GPTNeoMLP` with `gelu_new`."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.c_fc = Linear(spec.hidden_size, spec.intermediate_size, bias=True)
        self.c_proj = Linear(spec.intermediate_size, spec.hidden_size, bias=True)

    def _gelu_new(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """The tanh approximation of Hendrycks and Gimpel, arXiv:1606.08415."""
        cube = op.Mul(op.Mul(x, x), x)
        inner = op.Mul(op.Add(x, op.Mul(cube, 0.044715)), math.sqrt(2.0 / math.pi))
        return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(inner), 1.0))

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return self.c_proj(op, self._gelu_new(op, self.c_fc(op, x)))


class Block(nn.Module):
    """`GPTNeoBlock`."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.ln_1 = LayerNorm(spec.hidden_size, spec.layer_norm_epsilon)
        self.attn = Attention(spec, layer)
        self.ln_2 = LayerNorm(spec.hidden_size, spec.layer_norm_epsilon)
        self.mlp = MLP(spec)

    def forward(
        self,
        op: OpBuilder,
        residual: ir.Value,
        mask: ir.Value,
        past: tuple[ir.Value, ir.Value],
        select: Select,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        attended, key, value = self.attn(op, self.ln_1(op, residual), mask, past, select)
        residual = op.Add(mark_place(attended, self.layer, "attention"), select(residual))
        expanded = mark_place(self.mlp(op, self.ln_2(op, residual)), self.layer, "mlp")
        residual = op.Add(residual, expanded)
        return mark_place(residual, self.layer, "residual"), key, value


class Transformer(nn.Module):
    """`GPTNeoModel`."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.wte = Embedding(spec.vocab_size, spec.hidden_size)
        self.wpe = Embedding(spec.max_position_embeddings, spec.hidden_size)
        self.h = nn.ModuleList([Block(spec, layer) for layer in range(spec.num_layers)])
        self.ln_f = LayerNorm(spec.hidden_size, spec.layer_norm_epsilon)

    def _masks(self, op: OpBuilder, input_ids: ir.Value, attention_mask: ir.Value) -> Masks:
        """Both masks, shared by all layers: a layer has the window or it has none."""
        total = op.Shape(attention_mask, start=1, end=2)
        new = op.Shape(input_ids, start=1, end=2)
        slots = op.Range(0, op.Squeeze(total), 1)
        keys = op.Unsqueeze(slots, [0])
        queries = op.Unsqueeze(op.Slice(slots, op.Sub(total, new), total, [0]), [1])
        valid = op.Unsqueeze(op.Cast(attention_mask, to=ir.DataType.BOOL), [1, 2])
        causal = op.And(op.LessOrEqual(keys, queries), valid)
        recent = op.Greater(keys, op.Sub(queries, self.spec.window_size))
        windowed = op.And(causal, recent)
        causal.metadata_props[WINDOW_KEY] = "-1"
        windowed.metadata_props[WINDOW_KEY] = str(self.spec.window_size)
        return Masks(causal, windowed)

    def forward(
        self,
        op: OpBuilder,
        input_ids: ir.Value,
        attention_mask: ir.Value,
        position_ids: ir.Value,
        past_key_values: Sequence[tuple[ir.Value, ir.Value]],
        select: Select,
    ) -> tuple[ir.Value, list[tuple[ir.Value, ir.Value]]]:
        masks = self._masks(op, input_ids, attention_mask)
        residual = op.Add(self.wte(op, input_ids), self.wpe(op, position_ids))
        mark_place(residual, None, "embedding")
        present = []
        for kind, block, past in zip(
            self.spec.attention_layers, self.h, past_key_values, strict=True
        ):
            mask = masks.windowed if kind == "local" else masks.causal
            # The next layer's attention needs every position; after the last layer nothing does.
            kept = select if block is self.h[-1] else _every_position
            residual, key, value = block(op, residual, mask, past, kept)
            present.append((key, value))
        return mark_place(self.ln_f(op, residual), None, "final_norm"), present


class CausalLM(nn.Module):
    """`GPTNeoForCausalLM`; the head is the token embedding unless the checkpoint unties them."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.transformer = Transformer(spec)
        self.lm_head = None if spec.tie_word_embeddings else Head(spec.vocab_size, spec.hidden_size)

    def forward(
        self,
        op: OpBuilder,
        input_ids: ir.Value,
        attention_mask: ir.Value,
        position_ids: ir.Value,
        past_key_values: Sequence[tuple[ir.Value, ir.Value]],
        select: Select | None = None,
    ) -> tuple[ir.Value, list[tuple[ir.Value, ir.Value]]]:
        """Hidden states after the final norm [B, M, H], and the present keys and values.

        `select` maps [B, S, H] to the M wanted positions [B, M, H], by default all positions. For
        the others the last layer computes nothing after its attention.
        """
        return self.transformer(
            op,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            select or _every_position,
        )

    def logits(self, op: OpBuilder, hidden: ir.Value) -> ir.Value:
        """[B, M, H] → float32 [B, M, V].

        Gemm reads the table as it is stored ([V, H], with transB=1), so a tied head shares its
        bytes with the embedding. A Transpose would be constant-folded into a second copy.
        """
        table = self.transformer.wte.weight if self.lm_head is None else self.lm_head(op)
        rows = op.Reshape(hidden, [-1, self.spec.hidden_size])
        scores = op.Gemm(rows, table, transB=1)
        shape = op.Concat(op.Shape(hidden, start=0, end=2), [self.spec.vocab_size], axis=0)
        return op.Cast(op.Reshape(scores, shape), to=ir.DataType.FLOAT)
