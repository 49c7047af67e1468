"""Reads the integers and scales in a bundle, for checks of what was written."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from neo_runtime.errors import VerificationError

from neo_export.gpt_neo.parameters import place_in_packed
from neo_export.quantize.int4 import Int4Weight
from neo_export.quantize.int8 import Int8Weight
from neo_export.quantize.levels import FARTHEST

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["ReadBack"]


class ReadBack:
    """A quantizer that computes nothing: it returns what a graph of a bundle refers to.

    A check does not repeat GPTQ: for large models it takes minutes, and another order of summation
    can change an integer.
    """

    def __init__(self, graph: Path) -> None:
        """Read the structure of a graph, such as `bundle/score.onnx`; weights are memory-mapped."""
        self._initializers = ir.load(graph).graph.initializers

    def int8(self, name: str, weight: NDArray[np.float32]) -> Int8Weight:
        """The stored form of a matrix [out, in].

        Raises:
            VerificationError: what is stored is not near it.
        """
        integers, rows = self._find(name, "int8", len(weight))
        scales, _ = self._find(name, "int8.scales", len(weight))
        if integers.dtype == np.uint8:  # stored in blocks, all with their row's scale
            flat = integers[rows].reshape(len(weight), -1).astype(np.int16) - 128
            stored = Int8Weight(flat.astype(np.int8), scales[rows, 0])
        else:
            stored = Int8Weight(integers[:, rows].T, scales[rows])
        _check_near(name, "int8", weight, stored.read_back())
        return stored

    def int4(self, name: str, weight: NDArray[np.float32], block_size: int) -> Int4Weight:
        """The stored form of a matrix [out, in].

        Raises:
            VerificationError: what is stored is not near it.
        """
        packed, rows = self._find(name, "int4", len(weight))
        scales, _ = self._find(name, "int4.scales", len(weight))
        stored = Int4Weight(packed[rows].reshape(len(weight), -1, block_size // 2), scales[rows])
        _check_near(name, "int4", weight, stored.read_back())
        return stored

    def _find(self, name: str, kind: str, rows: int) -> tuple[NDArray[Any], slice]:
        """An array, and the matrix's rows in it: all, or a third of a packed projection."""
        place = place_in_packed(name)
        if self._stored_name(f"{name}.{kind}") is None and place is not None:
            packed, third = place
            return self._array(f"{packed}.{kind}"), slice(third * rows, (third + 1) * rows)
        return self._array(f"{name}.{kind}"), slice(0, rows)

    def _stored_name(self, name: str) -> str | None:
        """The name of this initializer, or of its half-precision copy (scales, for GPUs)."""
        names = (name, f"{name}.float16")
        return next((found for found in names if found in self._initializers), None)

    def _array(self, name: str) -> NDArray[Any]:
        found = self._stored_name(name)
        if found is None:
            raise VerificationError(f"the graph has no weight {name!r}, which the plan stores")
        tensor = self._initializers[found].const_value
        assert tensor is not None
        array = tensor.numpy()
        return array.astype(np.float32) if array.dtype == np.float16 else array


def _check_near(
    name: str, kind: str, weight: NDArray[np.float32], found: NDArray[np.float32]
) -> None:
    off = (found - weight).ravel()
    distance = math.sqrt(float(off @ off) / max(float(weight.ravel() @ weight.ravel()), 1e-30))
    if not distance <= FARTHEST[kind]:
        raise VerificationError(
            f"{name} as stored in {kind} is {distance:.3g} from the checkpoint's (relative L2), "
            f"expected at most {FARTHEST[kind]:g}"
        )
