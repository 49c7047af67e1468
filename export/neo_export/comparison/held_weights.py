"""A checkpoint's matrices as a quantized bundle holds them, where that is plain rounding.

What rounding took from the weights would hide a small mistake elsewhere. Where the integers in the
bundle are exactly those that rounding to nearest makes of the checkpoint's matrix, a step is judged
from them, and only the rounding of activations is left. Any other matrix (made by GPTQ, rescaled
for outliers, or wrong) is compared with the checkpoint's own, more loosely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from neo_runtime.bundle.manifest import is_quantized
from neo_runtime.errors import VerificationError

from neo_export.bundle.check import scoring_graph
from neo_export.gpt_neo.parameters import EMBEDDING, LAYER_MATRICES, head_name, place_in_packed
from neo_export.passes._tensors import static_shape
from neo_export.quantize.int4 import Int4Weight, quantize_int4
from neo_export.quantize.int8 import LIMIT, Int8Weight, quantize_int8
from neo_export.quantize.read_back import ReadBack

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from neo_runtime.bundle.manifest import Manifest
    from numpy.typing import NDArray

    from neo_export.comparison.places import Place

__all__ = ["HeldWeights", "open_held_weights"]


@dataclass(frozen=True)
class _Stored:
    """How a graph stores a matrix."""

    block_size: int | None
    """Of int4; None for int8."""
    eight_bits: bool
    """int8 uses all of them, as kernels do that multiply in floating point."""
    half: bool
    """Scales are float16."""

    def scales(self, exact: NDArray[np.float32]) -> NDArray[np.float32]:
        """As they are stored."""
        return exact.astype(np.float16).astype(np.float32) if self.half else exact


def open_held_weights(
    folder: Path, manifest: Manifest, read: Callable[[str], NDArray[np.float32]]
) -> dict[str, HeldWeights]:
    """By the graph that reads them, one for graphs that store all matrices alike.

    Empty for a bundle whose weights are not integers. The graph that scores is called "score" here,
    as in traces.

    Args:
        folder: the bundle.
        manifest: its manifest.
        read: reads a weight of the checkpoint.
    """
    if not is_quantized(manifest.precision):
        return {}
    made: list[tuple[dict[str, _Stored], HeldWeights]] = []
    found = {}
    for name, spec in manifest.graphs.items():
        storages = _storages(folder / spec.file)
        same = next((held for known, held in made if known == storages), None)
        if same is None:  # --int8-prefill: decode has int4 where the others have int8
            same = HeldWeights(folder / spec.file, storages, read)
            made.append((storages, same))
        found[name] = same
    return found | {"score": found[scoring_graph(manifest.graphs)]}


class HeldWeights:
    """Reads weights by the checkpoint's names, float32."""

    def __init__(
        self, graph: Path, storages: dict[str, _Stored], read: Callable[[str], NDArray[np.float32]]
    ) -> None:
        """Read the structure of a graph.

        Args:
            graph: its file.
            storages: how it stores them, by the matrix' name.
            read: reads a weight of the checkpoint.
        """
        self._read = read
        self._read_back = ReadBack(graph)
        self._blocks = storages
        self._held: set[str] = set()
        self._others: set[str] = set()
        self._last: tuple[str, NDArray[np.float32]] | None = None

    def __call__(self, name: str) -> NDArray[np.float32]:
        """The weight as the bundle holds it, or, where that is not known, the checkpoint's."""
        if self._last is not None and self._last[0] == name:  # a table, for the next text
            return self._last[1]
        weight = self._read(name)
        held = self._rounded(name, weight) if weight.ndim == 2 else None
        if held is None:
            return weight
        self._held.add(name)
        self._last = name, held
        return held

    def covers(self, place: Place, *, tied: bool) -> bool:
        """Whether all matrices that lead to a place were read as the bundle holds them."""
        layer, kind = place
        if layer is not None:
            leading = ("c_fc", "mlp") if kind == "mlp" else (kind,)  # c_fc is not compared
            matrices = [matrix for matrix in LAYER_MATRICES if matrix.gives in leading]
            names = [f"transformer.h.{layer}.{matrix.weight}" for matrix in matrices]
        else:
            names = [EMBEDDING if kind == "embedding" else head_name(tied=tied)]
        return bool(names) and self._held.issuperset(names)

    @property
    def odd_ones(self) -> list[str]:
        """Matrices whose integers are others than rounding makes, where those of most are not."""
        return sorted(self._others) if len(self._others) < len(self._held) else []

    def _rounded(self, name: str, weight: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """The matrix [out, in] rounded to nearest, where the bundle holds exactly that."""
        stored, place = self._blocks.get(name), place_in_packed(name)
        if stored is None and place is not None:
            stored = self._blocks.get(place[0])
        if stored is None:
            return None
        self._others.add(name)
        try:
            if stored.block_size is None:
                found = self._read_back.int8(name, weight).read_back()
                int8 = quantize_int8(weight, 127 if stored.eight_bits else LIMIT)
                expected = Int8Weight(int8.integers, stored.scales(int8.scales)).read_back()
            else:
                found = self._read_back.int4(name, weight, stored.block_size).read_back()
                int4 = quantize_int4(weight, stored.block_size)
                expected = Int4Weight(int4.packed, stored.scales(int4.scales)).read_back()
        except VerificationError:
            return None
        if found.shape != expected.shape or not np.array_equal(found, expected):
            return None
        self._others.discard(name)
        return expected


def _storages(graph: Path) -> dict[str, _Stored]:
    """By the matrix' name."""
    initializers = ir.load(graph).graph.initializers
    found = {}
    for name, value in initializers.items():
        matrix, _, kind = name.rpartition(".")
        scales = next(
            (n for n in (f"{name}.scales", f"{name}.scales.float16") if n in initializers), None
        )
        if kind not in ("int8", "int4") or scales is None:
            continue
        block = None
        if kind == "int4":
            packed, blocks = (math.prod(static_shape(initializers[n])) for n in (name, scales))
            block = 2 * packed // blocks  # two numbers a byte
        found[matrix] = _Stored(
            block_size=block,
            eight_bits=value.dtype == ir.DataType.UINT8,
            half=initializers[scales].dtype == ir.DataType.FLOAT16,
        )
    return found
