"""Maps a decode graph to launches: which programs run, in which order, over which memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_runtime.bundle.step_kernels import Argument, Extent
from neo_runtime.errors import EngineError

from neo_export.kernels.places import Memory, Value, in_tensor, in_weights, pointer_type
from neo_export.kernels.plan import Constant, Planned, PlannedStep, Variant

if TYPE_CHECKING:
    from collections.abc import Mapping

    from neo_runtime.bundle.manifest import Manifest

    from neo_export.kernels.graph import DecodeGraph, Layer, Matrix, Norm, Stored

__all__ = ["ROW_SIZES", "plan_step"]

ROW_SIZES = (1, 16, 32)
"""Batch sizes to compile for; a batch uses the smallest size that holds it."""
_PROGRAMS = 528
"""Target number of programs per product: four on each of an H100's 132 multiprocessors."""
_MOST_SPLITS = 16
_SMALLEST_BLOCK = 16
"""Fewest outputs per program."""
_CHUNK = 64
"""Positions per attention program."""
_MERGE = 8
"""Partial results that the last attention program loads at once: 512 positions per iteration."""
_VOCAB_BLOCK = 2048
_MOST_NUMBERS = 2**31 - 1
"""Most elements in a matrix: programs index them with 32 bits."""


def plan_step(graph: DecodeGraph, manifest: Manifest, rows: int, *, overlap: bool) -> PlannedStep:
    """Plan one decode step of up to `rows` sequences.

    Args:
        graph: from `read_graph`.
        manifest: the bundle's manifest.
        rows: one of `ROW_SIZES`.
        overlap: compile for programmatic dependent launch.

    Raises:
        EngineError: no program supports the model's sizes.
    """
    return _Planner(graph, manifest, rows, overlap=overlap).plan()


class _Planner:
    def __init__(self, graph: DecodeGraph, manifest: Manifest, rows: int, *, overlap: bool) -> None:
        self._graph, self._model, self._rows = graph, manifest.model, rows
        self._overlap = overlap
        self._half = pointer_type(graph.positions)
        outputs = {tensor.name: tensor for tensor in manifest.graphs["decode"].outputs}
        self._count = int(outputs["top_values"].shape[-1])
        self._planned: list[Planned] = []
        self._memory = self._allocate(manifest.max_length)

    def _allocate(self, max_length: int) -> Memory:
        model, rows, memory = self._model, self._rows, Memory()
        matrices = [m for layer in self._graph.layers for m in _matrices(layer)]
        matrices.append(self._graph.head)
        columns = max(-(-m.outputs // _SMALLEST_BLOCK) for m in matrices)
        # At the same place for all batch sizes: each step leaves them zero for the next one.
        memory.add("counters", "*i32", max(columns, ROW_SIZES[-1] * model.num_heads))
        splits = -(-max_length // _CHUNK)
        width = _power(model.head_dim) + 4
        parts = max(_parts(m, self._blocks(m), rows) for m in matrices)
        memory.add("parts", "*fp32", max(parts, rows * model.num_heads * splits * width))
        memory.add("residual", "*fp32", rows * model.hidden_size)
        memory.add("queries", "*fp32", rows * model.hidden_size)
        memory.add("normal", self._half, rows * model.hidden_size)
        memory.add("attended", self._half, rows * model.hidden_size)
        memory.add("inner", self._half, rows * model.intermediate_size)
        blocks = -(-model.vocab_size // _VOCAB_BLOCK)
        memory.add("best", "*i64", rows * blocks * _power(self._count))
        memory.add("masses", "*fp64", rows * blocks * 2)
        return memory

    def plan(self) -> PlannedStep:
        self._embed()
        for layer in self._graph.layers:
            self._layer(layer)
        self._project(
            self._graph.head, "logits", in_tensor("logits", "*fp32"), self._graph.final_norm
        )
        self._candidates()
        return PlannedStep(self._rows, tuple(self._planned), self._memory.size)

    def _own(self, name: str) -> Value:
        return self._memory.value(name)

    def _launch(
        self,
        program: str,
        values: list[Value],
        constants: Mapping[str, Constant],
        *grid: Extent,
        warps: int = 4,
    ) -> None:
        constants = {**constants, "PDL": self._overlap}
        variant = Variant(
            program, tuple(constants.items()), tuple(value.type for value in values), warps
        )
        sizes = (*grid, Extent(), Extent())
        arguments = tuple(value.argument for value in values)
        self._planned.append(Planned(variant, (sizes[0], sizes[1], sizes[2]), arguments))

    def _embed(self) -> None:
        tokens, width = self._graph.tokens, self._model.hidden_size
        if tokens.inputs != width:
            raise EngineError(
                f"the token embedding table has {tokens.inputs} columns, expected {width}; use the "
                "bundle without neo-kernels"
            )
        values = [
            in_tensor("input_ids", "*i64"),
            in_tensor("position_ids", "*i64"),
            in_weights(tokens.stored),
            in_weights(tokens.scales or self._graph.positions),
            in_weights(self._graph.positions),
            self._own("residual"),
        ]
        constants: dict[str, Constant] = {
            "WIDTH": width,
            "BLOCK": _power(width),
            "BITS": tokens.bits,
            "GROUP": tokens.group or 1,
        }
        self._launch("embed", values, constants, Extent(per_row=True))

    def _layer(self, layer: Layer) -> None:
        self._project(layer.qkv, "qkv", self._own("queries"), layer.norm_1, layer=layer.number)
        self._attend(layer)
        residual = self._own("residual")
        attended, inner = self._own("attended"), self._own("inner")
        self._project(layer.out_proj, "residual", residual, x=attended, bias=layer.out_bias)
        self._project(layer.c_fc, "gelu", inner, layer.norm_2, bias=layer.fc_bias)
        self._project(layer.c_proj, "residual", residual, x=inner, bias=layer.proj_bias)

    def _project(
        self,
        matrix: Matrix,
        end: str,
        out: Value,
        norm: Norm | None = None,
        *,
        x: Value | None = None,
        bias: Stored | None = None,
        layer: int | None = None,
    ) -> None:
        """Launch a linear layer. Without `x` its input is `norm` of the residual stream.

        For one row the norm is fused into the product; for more it is a launch of its own.

        Raises:
            EngineError: the matrix is too large.
        """
        if matrix.outputs * matrix.inputs > _MOST_NUMBERS:
            raise EngineError(
                f"there is no kernel for a matrix of {matrix.outputs} × {matrix.inputs} elements, "
                f"expected at most {_MOST_NUMBERS}; use the bundle without neo-kernels"
            )
        fused = norm is not None and self._rows == 1
        if norm is not None and not fused:
            self._normalize(norm)
        x = x or self._own("residual" if fused else "normal")
        unused = in_weights(matrix.stored)
        past = f"past_key_values.{layer}."
        values = [
            x,
            unused,
            in_weights(matrix.scales) if matrix.scales else unused,
            in_weights(norm.gamma) if norm and fused else unused,
            in_weights(norm.beta) if norm and fused else unused,
            in_weights(bias) if bias else unused,
            out,
            unused if layer is None else in_tensor(past + "key", self._half),
            unused if layer is None else in_tensor(past + "value", self._half),
            in_tensor("position_ids", "*i64"),
            self._own("parts"),
            self._own("counters"),
            Value(Argument(kind="rows"), "i32"),
            Value(Argument(kind="length"), "i32"),
        ]
        block_n, block_k, splits = self._blocks(matrix)
        constants: dict[str, Constant] = {
            "N": matrix.outputs,
            "K": matrix.inputs,
            "BITS": matrix.bits,
            "GROUP": matrix.group or 1,
            "BY_INPUT": matrix.by_input,
            "NORM": fused,
            "EPSILON": norm.epsilon if norm and fused else 0.0,
            "END": end,
            "HEAD_DIM": self._model.head_dim,
            "ROWS": self._rows,
            "WIDTH_BLOCK": _power(matrix.inputs) if fused else 1,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "SPLITS": splits,
        }
        columns = -(-matrix.outputs // block_n)
        self._launch("project", values, constants, Extent(times=columns), Extent(times=splits))

    def _blocks(self, matrix: Matrix) -> tuple[int, int, int]:
        """BLOCK_N and BLOCK_K of a tile, and SPLITS, the programs that share a sum (split-K).

        Tile rows span whole cache lines, and there are about `_PROGRAMS` programs, so that all run
        at once.
        """
        if self._rows > 1:
            block_n, block_k = 64, 128 if matrix.bits == 4 else 64
        elif matrix.by_input:
            block_n, block_k = 64, 64
        else:
            block_n, block_k = _SMALLEST_BLOCK, 512 if matrix.bits == 4 else 256
        block_k = max(block_k, matrix.group)
        columns = -(-matrix.outputs // block_n)
        splits = min(max(1, round(_PROGRAMS / columns)), -(-matrix.inputs // block_k), _MOST_SPLITS)
        return block_n, block_k, splits

    def _normalize(self, norm: Norm) -> None:
        width = self._model.hidden_size
        values = [
            self._own("residual"),
            in_weights(norm.gamma),
            in_weights(norm.beta),
            self._own("normal"),
        ]
        constants: dict[str, Constant] = {
            "WIDTH": width,
            "BLOCK": _power(width),
            "EPSILON": norm.epsilon,
        }
        self._launch("normalize", values, constants, Extent(per_row=True))

    def _attend(self, layer: Layer) -> None:
        heads, head_dim = self._model.num_heads, self._model.head_dim
        values = [
            self._own("queries"),
            in_tensor(f"past_key_values.{layer.number}.key", self._half),
            in_tensor(f"past_key_values.{layer.number}.value", self._half),
            in_tensor("position_ids", "*i64"),
            self._own("attended"),
            self._own("parts"),
            self._own("counters"),
            Value(Argument(kind="length"), "i32"),
        ]
        constants: dict[str, Constant] = {
            "HEADS": heads,
            "HEAD_DIM": head_dim,
            "BLOCK_D": _power(head_dim),
            "WINDOW": layer.window,
            "SCALE": layer.scale,
            "CHUNK": _CHUNK,
            "MERGE": _MERGE,
        }
        pieces = Extent(chunk=_CHUNK, most=layer.window)
        self._launch("attend", values, constants, Extent(times=heads, per_row=True), pieces)

    def _candidates(self) -> None:
        vocab = self._model.vocab_size
        blocks = -(-vocab // _VOCAB_BLOCK)
        logits = in_tensor("logits", "*fp32")
        best, masses = self._own("best"), self._own("masses")
        self._launch(
            "best_of_block",
            [logits, best, masses],
            {"VOCAB": vocab, "BLOCK": _VOCAB_BLOCK, "COUNT_BLOCK": _power(self._count)},
            Extent(times=blocks),
            Extent(per_row=True),
        )
        outputs = [
            in_tensor("top_values", "*fp32"),
            in_tensor("top_ids", "*i64"),
            in_tensor("exp_sum", "*fp64"),
        ]
        self._launch(
            "best_of_all",
            [best, masses, logits, *outputs],
            {"VOCAB": vocab, "BLOCKS": blocks, "BLOCKS_BLOCK": _power(blocks)}
            | {"COUNT": self._count, "COUNT_BLOCK": _power(self._count)},
            Extent(per_row=True),
            warps=16,
        )


def _matrices(layer: Layer) -> tuple[Matrix, ...]:
    return layer.qkv, layer.out_proj, layer.c_fc, layer.c_proj


def _parts(matrix: Matrix, blocks: tuple[int, int, int], rows: int) -> int:
    block_n, _, splits = blocks
    return -(-matrix.outputs // block_n) * splits * rows * block_n


def _power(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
