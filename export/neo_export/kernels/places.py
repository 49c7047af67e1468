"""Launch arguments: addresses in the weights, a step's tensors, or the kernels' own memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from neo_runtime.bundle.step_kernels import Argument
from neo_runtime.errors import EngineError
from onnx import TensorProto

from neo_export.kernels.plan import POINTER_ALIGNMENT

if TYPE_CHECKING:
    from neo_export.kernels.graph import Stored

__all__ = ["Memory", "Value", "in_tensor", "in_weights", "pointer_type"]

_ALIGNMENT = 256
_TYPES: dict[int, str] = {
    TensorProto.FLOAT16: "*fp16",
    TensorProto.BFLOAT16: "*bf16",
    TensorProto.UINT8: "*u8",
}
_SIZES = {"*fp16": 2, "*bf16": 2, "*i32": 4, "*fp32": 4, "*i64": 8, "*fp64": 8}


@dataclass(frozen=True)
class Value:
    """A launch argument and its Triton type."""

    argument: Argument
    type: str


@dataclass
class Memory:
    """Layout of the kernels' own memory."""

    size: int = 0
    """In bytes, a multiple of 256."""
    places: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Offset in bytes and pointer type, by name."""

    def add(self, name: str, kind: str, count: int) -> None:
        """Append a tensor of `count` elements; `kind` is a Triton pointer type such as "*fp32"."""
        self.places[name] = (self.size, kind)
        self.size += -(-count * _SIZES[kind] // _ALIGNMENT) * _ALIGNMENT

    def value(self, name: str) -> Value:
        """The tensor `name` as an argument."""
        offset, kind = self.places[name]
        return Value(Argument(kind="memory", offset=offset), kind)


def in_weights(stored: Stored) -> Value:
    """A stored tensor as an argument.

    Raises:
        EngineError: its offset is not aligned for the kernels' loads.
    """
    if stored.offset % POINTER_ALIGNMENT:
        raise EngineError(
            f"{stored.name} is at byte {stored.offset} of weights.bin, expected a multiple of "
            f"{POINTER_ALIGNMENT}, which the kernels' loads need; export the model again"
        )
    return Value(Argument(kind="weights", offset=stored.offset), pointer_type(stored))


def in_tensor(name: str, kind: str) -> Value:
    """A tensor of the decode graph as an argument."""
    return Value(Argument(kind="tensor", name=name), kind)


def pointer_type(stored: Stored) -> str:
    """Triton's pointer type for a stored tensor, such as "*fp16"."""
    return _TYPES[stored.element_type]
