"""Where arguments of a launch lie: in the weights, a step's tensors, or the kernels' memory."""

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
    """An argument and its type."""

    argument: Argument
    type: str


@dataclass
class Memory:
    """Places in the kernels' own memory, for the most rows of a step."""

    size: int = 0
    """Bytes."""
    places: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, name: str, kind: str, count: int) -> None:
        """A tensor of `count` numbers of a Triton pointer type."""
        self.places[name] = (self.size, kind)
        self.size += -(-count * _SIZES[kind] // _ALIGNMENT) * _ALIGNMENT

    def value(self, name: str) -> Value:
        """A tensor as an argument."""
        offset, kind = self.places[name]
        return Value(Argument(kind="memory", offset=offset), kind)


def in_weights(stored: Stored) -> Value:
    """A stored tensor as an argument.

    Raises:
        EngineError: it does not lie where kernels can read it.
    """
    if stored.offset % POINTER_ALIGNMENT:
        raise EngineError(
            f"{stored.name} lies at byte {stored.offset} of the weights, expected a multiple of "
            f"{POINTER_ALIGNMENT}, which kernels read at once; export the bundle again"
        )
    return Value(Argument(kind="weights", offset=stored.offset), pointer_type(stored))


def in_tensor(name: str, kind: str) -> Value:
    """A tensor of the decode graph as an argument."""
    return Value(Argument(kind="tensor", name=name), kind)


def pointer_type(stored: Stored) -> str:
    """Triton's type of a pointer to a stored tensor: "*fp16"."""
    return _TYPES[stored.element_type]
