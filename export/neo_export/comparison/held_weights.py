"""A checkpoint's matrices as a quantized bundle holds them, if they are plainly rounded.

The rounding error of the weights would hide a small mistake elsewhere. If a bundle's integers are
exactly the checkpoint's matrix rounded to nearest, a step is computed with them, and only the
rounding of activations is left as error. For any other matrix (from GPTQ, rescaled for outliers, or
wrong) the step is computed with the checkpoint's own matrix, and judged more loosely.
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
    """Block size of int4; None for int8."""
    eight_bits: bool
    """Whether int8 uses all eight bits, for kernels that multiply in floating point."""
    half: bool
    """Whether scales are float16."""

    def scales(self, exact: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scales in the stored precision."""
        return exact.astype(np.float16).astype(np.float32) if self.half else exact


def open_held_weights(
    folder: Path, manifest: Manifest, read: Callable[[str], NDArray[np.float32]]
) -> dict[str, HeldWeights]:
    """The held weights by graph; graphs that store all matrices alike share one object.

    Empty for a bundle without integer weights. The scoring graph is called "score" here, as in
    traces.

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
        if same is None:  # with --int8-prefill, decode has int4 where the other graphs have int8
            same = HeldWeights(folder / spec.file, storages, read)
            made.append((storages, same))
        found[name] = same
    return found | {"score": found[scoring_graph(manifest.graphs)]}


class HeldWeights:
    """Reads weights by their names in the checkpoint, as float32."""

    def __init__(
        self, graph: Path, storages: dict[str, _Stored], read: Callable[[str], NDArray[np.float32]]
    ) -> None:
        """Read the structure of a graph.

        Args:
            graph: the graph's file.
            storages: how it stores each matrix, by name.
            read: reads a weight of the checkpoint.
        """
        self._read = read
        self._read_back = ReadBack(graph)
        self._blocks = storages
        self._held: set[str] = set()
        self._others: set[str] = set()
        self._last: tuple[str, NDArray[np.float32]] | None = None

    def __call__(self, name: str) -> NDArray[np.float32]:
        """The weight as the bundle holds it if it is plainly rounded, or the checkpoint's."""
        if self._last is not None and self._last[0] == name:  # each text reads the table again
            return self._last[1]
        weight = self._read(name)
        held = self._rounded(name, weight) if weight.ndim == 2 else None
        if held is None:
            return weight
        self._held.add(name)
        self._last = name, held
        return held

    def covers(self, place: Place, *, tied: bool) -> bool:
        """Whether all matrices that lead to a place are known as the bundle holds them."""
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
        """Matrices that are not plainly rounded, in a bundle where most are."""
        return sorted(self._others) if len(self._others) < len(self._held) else []

    def _rounded(self, name: str, weight: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """The matrix [out, in] rounded to nearest, if the bundle holds exactly that; else None."""
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
    """How a graph stores each matrix, by name."""
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
            block = 2 * packed // blocks  # two numbers per byte
        found[matrix] = _Stored(
            block_size=block,
            eight_bits=value.dtype == ir.DataType.UINT8,
            half=initializers[scales].dtype == ir.DataType.FLOAT16,
        )
    return found
