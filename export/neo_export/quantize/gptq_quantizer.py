"""GPTQ with the statistics of calibration text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from neo_export.gpt_neo.parameters import EMBEDDING, head_name, input_place
from neo_export.quantize.gptq import damped, gptq
from neo_export.quantize.int4 import INT4_LEVELS, Int4Weight, pack_int4, quantize_int4
from neo_export.quantize.int8 import LIMIT, Int8Weight, quantize_int8
from neo_export.quantize.levels import Levels
from neo_export.quantize.own_inputs import OWN_SHARE, own_inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from neo_export.quantize.own_inputs import OwnInputs
    from neo_export.statistics.folder import LikelyTokens

__all__ = ["GptqQuantizer"]

_PLAIN = (1.0,)
_EMBEDDING_SHARE = 0.2
"""Share of the mean of H's diagonal that is added to the diagonal for a tied table. Row v is used
as the head where v is likely, and as the embedding where v is read: about equally often, so one
share suits all rows. It is the ratio of two curvatures of the KL divergence: with respect to the
embedding and with respect to the logits. Computed from gradients (Fisher information) it is 0.09 to
0.15 on neo-mini; 0.1 to 0.3 gave the least KL divergence there."""


class GptqQuantizer:
    """GPTQ for every matrix that multiplies activations; an untied embedding is plainly rounded."""

    def __init__(
        self,
        second_moment: Callable[[str], NDArray[np.floating[Any]]],
        *,
        tied: bool,
        eight_bits: bool = False,
        table_scale: NDArray[np.float32] | None = None,
        likely: Callable[[], LikelyTokens | None] | None = None,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            second_moment: returns E[x xᵀ] at a place, such as `Statistics.second_moment`.
            tied: whether the embedding is the head.
            eight_bits: whether int8 uses −127…127, for kernels that multiply in floating point.
            table_scale: [in]; the stored table's channels are multiplied by it, and rows that are
                looked up are divided by it.
            likely: returns the tokens that are likely in the text, such as `Statistics.likely`:
                each row of an int4 head is rounded for the contexts of its token.
        """
        self._second_moment = second_moment
        self._tied = tied
        self._table_scale = np.float32(1) if table_scale is None else table_scale
        self._likely = likely
        self._limit = 127 if eight_bits else LIMIT

    def int8(self, name: str, weight: NDArray[np.float32]) -> Int8Weight:
        """Quantize [out, in] with one scale per row."""
        moment = self._moment(name)
        if moment is None:
            return quantize_int8(weight, limit=self._limit)
        levels = Levels(-self._limit, self._limit, _PLAIN)
        integers, scales = gptq(weight, moment, weight.shape[1], levels)
        # A fitted scale may be negative; flipping its sign and the integers' changes nothing.
        turned = np.where(scales < 0, np.int8(-1), np.int8(1))
        return Int8Weight(integers * turned, np.abs(scales[:, 0]))

    def int4(self, name: str, weight: NDArray[np.float32], block_size: int) -> Int4Weight:
        """Quantize [out, in] with a scale for each `block_size` consecutive inputs of a row."""
        own = self._own(name, len(weight))
        moment = self._moment(name, 1.0 if own is None else 1.0 + OWN_SHARE)
        if moment is None:
            return quantize_int4(weight, block_size)
        integers, scales = gptq(weight, moment, block_size, INT4_LEVELS, own)
        packed = pack_int4(integers).reshape(*scales.shape, block_size // 2)
        return Int4Weight(packed, scales)

    def _own(self, name: str, rows: int) -> OwnInputs | None:
        """The inputs that count for single rows, for a head whose likely tokens are known."""
        is_head = name == head_name(tied=self._tied)
        likely = self._likely() if is_head and self._likely is not None else None
        return None if likely is None else own_inputs(likely, rows, self._table_scale)

    def _moment(self, name: str, share: float = 1.0) -> NDArray[np.float64] | None:
        """H of a matrix's inputs; None for a table that is only looked up.

        Args:
            name: the matrix.
            share: total weight of a head's inputs, in multiples of H: 1, plus their own inputs'.
        """
        if name == EMBEDDING and not self._tied:
            return None
        place = input_place(name)
        moment = damped(self._second_moment(place))
        if name == EMBEDDING:
            scale = self._table_scale.astype(np.float64)
            # A row that is looked up has the error ‖dw / s‖²; the mean is of the inputs before s.
            mean = float(np.mean(np.diagonal(moment) * scale * scale))
            moment[np.diag_indices(len(moment))] += share * _EMBEDDING_SHARE * mean / scale**2
        return moment
