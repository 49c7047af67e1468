"""The program of the attention, interpreted by itself, where texts, windows and pieces end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEADS, HEAD_DIM, LENGTH, CHUNK = 2, 20, 700, 64
PIECE = 32 + 4
"""Numbers that a piece leaves: the next power of two, and what goes with the sum."""
POSITIONS = (0, 63, 64, 255, 256, 257, 698, 699)


def attended(
    queries: NDArray[np.float32], cache: list[NDArray[np.float16]], window: int
) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
    """What the program writes, float16 [rows, HEADS, HEAD_DIM], and its counters afterwards."""
    from neo_export.kernels import programs

    pieces = -(-min(LENGTH, window or LENGTH) // CHUNK)
    rows = len(queries)
    out = torch.full((rows, HEADS, HEAD_DIM), torch.nan, dtype=torch.float16)
    parts = torch.full((rows * HEADS, pieces, PIECE), torch.nan)
    counters = torch.zeros(rows * HEADS, dtype=torch.int32)
    program: Any = programs.attend
    program[(rows * HEADS, pieces, 1)](
        torch.from_numpy(queries),
        *(torch.from_numpy(one) for one in cache),
        torch.tensor(POSITIONS),
        out,
        parts,
        counters,
        LENGTH,
        HEADS=HEADS,
        HEAD_DIM=HEAD_DIM,
        BLOCK_D=32,
        WINDOW=window,
        SCALE=0.5,
        CHUNK=CHUNK,
        MERGE=8,
        PDL=False,
    )
    return out.numpy(), counters.numpy()


@pytest.mark.parametrize("window", [0, 1, 100, 256])
def test_what_is_seen_and_nothing_else(window: int) -> None:
    """All else is NaN: what a text has not written, and what a window leaves behind."""
    generator = np.random.default_rng(window)
    shape = (len(POSITIONS), HEADS, LENGTH, HEAD_DIM)
    keys, values = (generator.standard_normal(shape).astype(np.float16) for _ in range(2))
    queries = generator.standard_normal((len(POSITIONS), HEADS, HEAD_DIM)).astype(np.float32)
    expected = np.empty(queries.shape)
    for row, position in enumerate(POSITIONS):
        first = max(0, position + 1 - window) if window else 0
        seen = slice(first, position + 1)
        for one in (keys, values):
            one[row, :, :first] = one[row, :, position + 1 :] = np.nan
        scores = 0.5 * np.einsum("hd,hpd->hp", queries[row], keys[row, :, seen].astype(np.float64))
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        expected[row] = np.einsum("hp,hpd->hd", weights, values[row, :, seen].astype(np.float64))
    found, counters = attended(queries, [keys, values], window)
    np.testing.assert_allclose(found, expected, rtol=2**-10, atol=1e-5)
    assert not counters.any(), "the next launch begins with zeros"
