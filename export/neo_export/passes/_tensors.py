"""Lazy tensors: their data is computed when it is written, so passes never hold the weights."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = [
    "ALIAS_KEY",
    "add_initializer",
    "add_lazy_initializer",
    "add_lazy_parts",
    "alias_of",
    "constant_value",
    "is_parameter",
    "lazy_tensor",
    "logits_of",
    "read",
    "static_shape",
]

ALIAS_KEY = "neo.alias"
"""Metadata of an initializer over the bytes of another one in another shape: the other's name."""


def read(value: ir.Value) -> NDArray[Any]:
    """The data of an initializer, computed or memory-mapped by this call."""
    if value.const_value is None:
        raise ValueError(f"{value.name} has no data yet: bind the checkpoint's tensors first")
    return value.const_value.numpy()


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register `tensor` as the initializer `name`; if that exists already, it is returned."""
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
    )
    value.const_value = tensor
    graph.register_initializer(value)
    return value


def add_lazy_initializer(
    graph: ir.Graph,
    name: str,
    make: Callable[[], NDArray[Any]],
    *,
    dtype: ir.DataType,
    shape: tuple[int, ...],
) -> ir.Value:
    """Register an initializer whose data `make` computes at every read."""
    return add_initializer(graph, name, lazy_tensor(name, make, dtype=dtype, shape=shape))


def lazy_tensor(
    name: str,
    make: Callable[[], NDArray[Any]],
    *,
    dtype: ir.DataType,
    shape: tuple[int, ...],
) -> ir.LazyTensor:
    """A tensor whose data `make` computes at every read."""
    return ir.LazyTensor(
        lambda: ir.tensor(make(), dtype=dtype, name=name),
        dtype=dtype,
        shape=ir.Shape(shape),
        name=name,
        cache=False,
    )


def add_lazy_parts(
    graph: ir.Graph,
    parts: dict[str, tuple[ir.DataType, tuple[int, ...]]],
    make: Callable[[], tuple[NDArray[Any], ...]],
) -> tuple[ir.Value, ...]:
    """Register initializers that are computed together (a weight's integers and its scales).

    Args:
        graph: where they are registered.
        parts: name → type and shape, in the order in which `make` returns them.
        make: called when a part is read; the other parts are kept until they are read, too.
    """
    kept: dict[int, NDArray[Any]] = {}

    def take(index: int) -> NDArray[Any]:
        if index not in kept:
            kept.update(enumerate(make()))
        return kept.pop(index)

    return tuple(
        add_lazy_initializer(graph, name, partial(take, index), dtype=dtype, shape=shape)
        for index, (name, (dtype, shape)) in enumerate(parts.items())
    )


def alias_of(value: ir.Value, name: str, shape: tuple[int, ...]) -> ir.Value:
    """An initializer over the same bytes of the weight file, in another shape."""
    assert value.graph is not None
    assert value.dtype is not None
    assert value.name is not None
    alias = add_lazy_initializer(
        value.graph,
        name,
        lambda: read(value).reshape(shape),
        dtype=value.dtype,
        shape=shape,
    )
    alias.metadata_props[ALIAS_KEY] = value.name
    return alias


def logits_of(graph: ir.Graph) -> tuple[ir.Value, int]:
    """The output "logits", [batch, rows, vocabulary], and the size of its vocabulary."""
    logits = next(value for value in graph.outputs if value.name == "logits")
    assert logits.shape is not None
    vocabulary = logits.shape[2]
    assert isinstance(vocabulary, int)
    return logits, vocabulary


def static_shape(value: ir.Value) -> tuple[int, ...]:
    """The shape of a value whose dimensions are all known."""
    shape = value.shape
    if shape is None or not shape.is_static():
        raise ValueError(f"the shape of {value.name} is not known: {shape}")
    return shape.numpy()


def is_parameter(value: ir.Value | None) -> bool:
    """Whether the value is an initializer of the graph, not computed by it."""
    return value is not None and value.is_initializer()


def constant_value(value: ir.Value | None) -> float | None:
    """The number in a constant of one element; None for anything else."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or tensor.size != 1:
        return None
    return float(tensor.numpy().reshape(()))
