"""Reads the structure of a CUDA decode graph from its operators.

The reader follows the graph from the embeddings to the logits and refuses, by name, every operator
it does not recognize. So kernels never replace a graph that computes something else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from neo_runtime.errors import EngineError
from onnx import TensorProto, helper

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["DecodeGraph", "Layer", "Matrix", "Norm", "Stored", "read_graph"]


@dataclass(frozen=True)
class Stored:
    """A tensor in `weights.bin`."""

    name: str
    shape: tuple[int, ...]
    element_type: int
    """A `TensorProto.DataType`."""
    offset: int
    """In bytes."""


@dataclass(frozen=True)
class Matrix:
    """A stored matrix of `outputs` × `inputs` elements."""

    outputs: int
    inputs: int
    stored: Stored
    bits: int
    """Per element. 16: float16 or bfloat16; 8 or 4: quantized, with scales."""
    by_input: bool
    """Whether the layout is [inputs, outputs] instead of [outputs, inputs]."""
    scales: Stored | None = None
    group: int = 0
    """Consecutive inputs that share a scale; 0 without scales."""


@dataclass(frozen=True)
class Norm:
    """Scale and shift of a layer norm."""

    gamma: Stored
    beta: Stored
    epsilon: float


@dataclass(frozen=True)
class Layer:
    """One transformer layer."""

    norm_1: Norm
    qkv: Matrix
    window: int
    """Positions each query attends to, itself included; 0: all."""
    scale: float
    """Factor of the attention scores."""
    out_proj: Matrix
    out_bias: Stored
    norm_2: Norm
    c_fc: Matrix
    fc_bias: Stored
    c_proj: Matrix
    proj_bias: Stored
    number: int


@dataclass(frozen=True)
class DecodeGraph:
    """A complete decode step."""

    tokens: Matrix
    positions: Stored
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Matrix


def read_graph(model: ModelProto, vocab_size: int) -> DecodeGraph:
    """Read the decode graph of a bundle for target `cuda`.

    Args:
        model: the graph, with or without its external data loaded.
        vocab_size: number of logits; the head's matrix may be padded to more rows.

    Raises:
        EngineError: there is no kernel for an operator or a tensor.
    """
    return _Reader(model).read(vocab_size)


class _Reader:
    """Finds operators by the tensors they read and write."""

    def __init__(self, model: ModelProto) -> None:
        self._stored = {}
        for tensor in model.graph.initializer:
            places = {entry.key: entry.value for entry in tensor.external_data}
            if tensor.data_location == TensorProto.EXTERNAL:
                self._stored[tensor.name] = Stored(
                    tensor.name, tuple(tensor.dims), tensor.data_type, int(places["offset"])
                )
        self._nodes: list[NodeProto] = list(model.graph.node)

    def read(self, vocab_size: int) -> DecodeGraph:
        token_node = self._reader_of("input_ids", ("Gather", "GatherBlockQuantized"))
        position_node = self._reader_of("position_ids", ("Gather",))
        norm_node = self._reader_of(token_node.output[0], ("SkipLayerNormalization",))
        if list(norm_node.input[:2]) != [token_node.output[0], position_node.output[0]]:
            raise _unknown(norm_node, "the token and position embeddings as its inputs")
        layers: list[Layer] = []
        while True:
            norm = self._norm(norm_node)
            user = self._reader_of(norm_node.output[0], ("MatMul", "MatMulNBits", "Add"))
            if user.op_type == "Add":
                break
            layer, norm_node = self._layer(len(layers), norm, norm_node, user)
            layers.append(layer)
        head = self._head(user, vocab_size)
        tokens = self._table(token_node)
        return DecodeGraph(tokens, self._tensor(position_node, 0), tuple(layers), norm, head)

    def _layer(
        self, number: int, norm: Norm, norm_node: NodeProto, node: NodeProto
    ) -> tuple[Layer, NodeProto]:
        qkv = self._matrix(node)
        attention = self._reader_of(node.output[0], ("GroupQueryAttention",))
        told = _attributes(attention)
        expected = (f"past_key_values.{number}.key", f"past_key_values.{number}.value")
        if tuple(attention.input[3:5]) != expected or told["num_heads"] != told["kv_num_heads"]:
            raise _unknown(attention, f"attention over {expected[0]}, key heads = query heads")
        if told.get("do_rotary") or told.get("softcap"):
            raise _unknown(attention, "neither rotary embeddings nor a softcap")
        out_node = self._reader_of(attention.output[0], ("MatMul", "MatMulNBits"))
        second = self._reader_of(out_node.output[0], ("SkipLayerNormalization",))
        self._check_sum(second, out_node, norm_node)
        fc_node = self._reader_of(second.output[0], ("MatMul", "MatMulNBits"))
        gelu = self._reader_of(fc_node.output[0], ("FastGelu",))
        proj_node = self._reader_of(gelu.output[0], ("MatMul", "MatMulNBits"))
        after = self._reader_of(proj_node.output[0], ("SkipLayerNormalization",))
        self._check_sum(after, proj_node, second)
        layer = Layer(
            norm_1=norm,
            qkv=qkv,
            window=max(0, told["local_window_size"]),
            scale=told["scale"],
            out_proj=self._matrix(out_node),
            out_bias=self._tensor(second, 4),
            norm_2=self._norm(second),
            c_fc=self._matrix(fc_node),
            fc_bias=self._tensor(gelu, 1),
            c_proj=self._matrix(proj_node),
            proj_bias=self._tensor(after, 4),
            number=number,
        )
        return layer, after

    def _check_sum(self, node: NodeProto, added: NodeProto, before: NodeProto) -> None:
        if list(node.input[:2]) != [added.output[0], before.output[3]]:
            raise _unknown(node, "the sum of a product and the residual stream")

    def _head(self, guard: NodeProto, vocab_size: int) -> Matrix:
        flat = self._reader_of(guard.output[0], ("Reshape",))
        node = self._reader_of(flat.output[0], ("Gemm", "MatMulNBits"))
        matrix = self._matrix(node)
        if matrix.outputs < vocab_size:
            raise _unknown(node, f"at least {vocab_size} logits")
        return replace(matrix, outputs=vocab_size)

    def _table(self, node: NodeProto) -> Matrix:
        """The token embedding table."""
        stored = self._tensor(node, 0)
        if node.op_type == "Gather":
            return Matrix(stored.shape[0], stored.shape[1], stored, 16, by_input=False)
        told = _attributes(node)
        if len(node.input) > 3 or told["quantize_axis"] != 1 or told["gather_axis"] != 0:
            raise _unknown(node, "a lookup of block-quantized rows without zero points")
        scales = self._tensor(node, 2)
        width = scales.shape[1] * told["block_size"]
        return Matrix(
            stored.shape[0], width, stored, told["bits"], False, scales, told["block_size"]
        )

    def _matrix(self, node: NodeProto) -> Matrix:
        stored = self._tensor(node, 1)
        if node.op_type != "MatMulNBits":
            if len(node.input) > 2 or stored.element_type not in _HALF:
                raise _unknown(node, "a half-precision product without a bias")
            by_input = not _attributes(node).get("transB", 0)
            rows, columns = stored.shape
            outputs, inputs = (columns, rows) if by_input else (rows, columns)
            return Matrix(outputs, inputs, stored, 16, by_input)
        told = _attributes(node)
        if any(node.input[3:]):
            raise _unknown(node, "blocks without zero points, group indices or bias")
        group, inputs = told["block_size"], told["K"]
        if inputs % group:
            raise _unknown(node, f"a multiple of {group} inputs, not {inputs}")
        scales = self._tensor(node, 2)
        return Matrix(told["N"], inputs, stored, told["bits"], False, scales, group)

    def _norm(self, node: NodeProto) -> Norm:
        return Norm(self._tensor(node, 2), self._tensor(node, 3), _attributes(node)["epsilon"])

    def _tensor(self, node: NodeProto, index: int) -> Stored:
        name = node.input[index] if index < len(node.input) else ""
        if name not in self._stored:
            raise _unknown(node, f"a stored tensor as input {index}")
        return self._stored[name]

    def _reader_of(self, tensor: str, operators: tuple[str, ...]) -> NodeProto:
        """The only operator of these types that reads a tensor.

        Also allowed as readers are Shape, and SkipLayerNormalization, which reads the residual
        stream.
        """
        found = [node for node in self._nodes if tensor in node.input and node.op_type != "Shape"]
        known = [node for node in found if node.op_type in operators]
        others = [n for n in found if n not in known and n.op_type != "SkipLayerNormalization"]
        if len(known) != 1 or others:
            names = ", ".join(f"{node.op_type} {node.name}" for node in found) or "nothing"
            raise EngineError(
                f"there are no kernels for this decode graph: {tensor} is read by {names}, "
                f"expected one {' or '.join(operators)}; use the bundle without neo-kernels"
            )
        (node,) = known
        return node


_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def _unknown(node: NodeProto, expected: str) -> EngineError:
    return EngineError(
        f"there is no kernel for {node.op_type} {node.name} of the decode graph: expected "
        f"{expected}; use the bundle without neo-kernels"
    )
