"""References for quantized bundles, and copies of bundles with one change in their graphs.

`dequantized_checkpoint` is the checkpoint with the bundle's dequantized weights: PyTorch
running on it differs from the bundle by the rounding of activations alone. `exact_activations`
takes that away too: then only the order of float32 sums is left, as in a float32 bundle.
"""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np
import onnx
from neo_export.quantize.int4 import dequantize_int4
from neo_export.quantize.int8 import dequantize_int8
from onnx import helper
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from neo_export.targets import Quantization
    from numpy.typing import NDArray

GRAPHS = ("prefill", "decode", "score")


def dequantized_checkpoint(
    source: Path, folder: Path, precision: str, quantization: Quantization
) -> Path:
    """Copy a checkpoint with every matrix rounded as `precision` stores it; returns `folder`."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensors[name] = _stored(name, tensor, precision, quantization)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _stored(
    name: str, tensor: NDArray[np.float32], precision: str, quantization: Quantization
) -> NDArray[np.float32]:
    if name.endswith("wpe.weight"):
        return tensor.astype(np.float16).astype(np.float32)
    if any(fnmatchcase(name, pattern) for pattern in quantization.keep):
        return tensor
    kind, block_size = precision, quantization.block_size
    if quantization.plan is not None:
        planned = dict(quantization.plan.weights)  # full names, not patterns
        storage = planned.get(name, quantization.plan.default)
        kind, block_size = storage.kind, storage.block_size
    if kind == "fp32":
        return tensor
    if kind == "int8":
        return dequantize_int8(tensor)
    assert block_size is not None
    return dequantize_int4(tensor, block_size)


def altered(bundle: Path, folder: Path, *changes: Callable[[onnx.ModelProto], int]) -> Path:
    """Copy a bundle and apply a change to every graph; fails if it changes nothing in one."""
    shutil.copytree(bundle, folder)
    for name in GRAPHS:
        path = folder / f"{name}.onnx"
        model = onnx.load(str(path), load_external_data=False)
        for change in changes:
            assert change(model) > 0, f"{name}: nothing to change"
        onnx.save(model, str(path))
    return folder


def exact_activations(model: onnx.ModelProto) -> int:
    """Make the products use unquantized activations; returns the number of products."""
    blocks = _nodes(model, "MatMulNBits")
    for node in blocks:
        set_attribute(node, "accuracy_level", 0)
    return len(blocks) + _float_products(model)


def _float_products(model: onnx.ModelProto) -> int:
    """x quantized, MatMulIntegerToFloat, · row   →   MatMul(x, DequantizeLinear(weight))."""
    made = {output: node for node in model.graph.node for output in node.output}
    products = _nodes(model, "MatMulIntegerToFloat")
    for product in products:
        [scaled] = [n for n in _nodes(model, "Mul") if product.output[0] in n.input]
        x, row = _rounded(made, made[product.input[0]])
        assert row in scaled.input
        weight = f"{scaled.output[0]}.weight"
        integers, scales, output = product.input[1], product.input[3], scaled.output[0]
        at = list(model.graph.node).index(scaled)
        model.graph.node.remove(scaled)
        model.graph.node.insert(at, helper.make_node("MatMul", [x, weight], [output]))
        widen = helper.make_node("DequantizeLinear", [integers, scales], [weight], axis=1)
        model.graph.node.insert(at, widen)
    _drop_unused(model)
    rounded = [n for n in _nodes(model, "QuantizeLinear") if n.input[2].startswith("int8.zero")]
    assert not products or not rounded
    return len(products)


def _rounded(made: dict[str, onnx.NodeProto], node: onnx.NodeProto) -> tuple[str, str]:
    """Names of the activations that are quantized, and of their rows' largest values."""
    if get_attribute(node, "block_size") > 0:
        step = made[node.input[1]]
        assert step.op_type == "Mul"
        return node.input[0], step.input[0]
    divide = made[node.input[0]]
    assert divide.op_type == "Div"
    return divide.input[0], divide.input[1]


def _drop_unused(model: onnx.ModelProto) -> None:
    while True:
        used = {name for node in model.graph.node for name in node.input}
        used |= {output.name for output in model.graph.output}
        unused = [node for node in model.graph.node if not used & set(node.output)]
        if not unused:
            return
        for node in unused:
            model.graph.node.remove(node)


def window(change: int) -> Callable[[onnx.ModelProto], int]:
    """Make local layers attend to `change` more positions."""

    def off_by(model: onnx.ModelProto) -> int:
        local = [
            (node, size)
            for node in _nodes(model, "GroupQueryAttention")
            if (size := get_attribute(node, "local_window_size")) > 0
        ]
        for node, size in local:
            set_attribute(node, "local_window_size", size + change)
        return len(local)

    return off_by


def scaled_attention(model: onnx.ModelProto) -> int:
    """Scale scores by 1/√d, as other models do but GPT-Neo does not."""
    nodes = _nodes(model, "GroupQueryAttention")
    for node in nodes:
        [attribute] = [a for a in node.attribute if a.name == "scale"]
        attribute.f = 0.25
    return len(nodes)


def swapped_layers(model: onnx.ModelProto) -> int:
    """Swap the first MLP matrices of layers 0 and 1."""
    places = {f"h.{a}.mlp.c_fc.": f"h.{b}.mlp.c_fc." for a, b in ((0, 1), (1, 0))}
    swapped = 0
    for tensor in model.graph.initializer:
        for old, new in places.items():
            if old in tensor.name:
                tensor.name = tensor.name.replace(old, new)
                swapped += 1
                break
    return swapped


def get_attribute(node: onnx.NodeProto, name: str) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), -1)


def set_attribute(node: onnx.NodeProto, name: str, value: int) -> None:
    [attribute] = [a for a in node.attribute if a.name == name]
    attribute.i = value


def _nodes(model: onnx.ModelProto, operator: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == operator]
