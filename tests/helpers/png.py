"""A small PNG reader without a library: 8-bit RGB or RGBA, not interlaced."""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

RGB, RGBA = 2, 6


def colours(path: Path) -> Counter[tuple[int, int, int]]:
    """Number of pixels of each colour."""
    flat = pixels(path).reshape(-1, 3).astype(np.uint32)
    packed = flat @ np.array([65536, 256, 1], dtype=np.uint32)
    values, counts = np.unique(packed, return_counts=True)
    return Counter(
        {
            (int(value) >> 16, int(value) >> 8 & 255, int(value) & 255): int(count)
            for value, count in zip(values, counts, strict=True)
        }
    )


def pixels(path: Path) -> NDArray[np.uint8]:
    """[height, width, 3]."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    body, at = b"", 8
    width = height = channels = 0
    while at < len(data):
        [size] = struct.unpack(">I", data[at : at + 4])
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", content)
            assert (depth, interlaced) == (8, 0)
            channels = {RGB: 3, RGBA: 4}[colour]
        elif kind == b"IDAT":
            body += content
        at += size + 12
    lines = np.frombuffer(zlib.decompress(body), dtype=np.uint8).reshape(height, -1)
    return _unfiltered(lines, channels).reshape(height, width, channels)[..., :3]


def _unfiltered(lines: NDArray[np.uint8], step: int) -> NDArray[np.uint8]:
    """Undo the filters of all scanlines (PNG specification, section 9)."""
    result = np.zeros((len(lines), lines.shape[1] - 1), dtype=np.uint8)
    above = np.zeros(lines.shape[1] - 1, dtype=np.uint8)
    for number, line in enumerate(lines):
        kind, found = int(line[0]), line[1:].copy()
        if kind == 1:
            found = _summed(found, step)
        elif kind == 2:
            found = found + above
        elif kind in (3, 4):
            found = _predicted(found, above, step, kind)
        result[number] = above = found
    return result


def _summed(line: NDArray[np.uint8], step: int) -> NDArray[np.uint8]:
    return line.reshape(-1, step).cumsum(axis=0, dtype=np.uint8).reshape(-1)


def _predicted(
    line: NDArray[np.uint8], above: NDArray[np.uint8], step: int, kind: int
) -> NDArray[np.uint8]:
    """Average (3) and Paeth (4), byte by byte: each needs the one before it."""
    found, up = [0] * step + line.tolist(), [0] * step + above.tolist()
    for at in range(step, len(found)):
        left, over, corner = found[at - step], up[at], up[at - step]
        if kind == 3:
            guess = (left + over) // 2
        else:
            estimate = left + over - corner
            guess = min(
                (abs(estimate - left), 0, left),
                (abs(estimate - over), 1, over),
                (abs(estimate - corner), 2, corner),
            )[2]
        found[at] = (found[at] + guess) & 255
    return np.array(found[step:], dtype=np.uint8)
