"""Runs a bundle's graphs in every way, and yields results with the expected ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.running import Cache, Graphs
    from numpy.typing import NDArray


def passages(
    graphs: Graphs, ids: NDArray[np.int64], logits: NDArray[np.float32], window: int
) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
    """Yield what was run, the logits found and those expected.

    Args:
        graphs: of the bundle.
        ids: [1, S], as many as the model has positions.
        logits: [1, S, V], expected at each of them.
        window: of the local layers.
    """
    end = ids.shape[1]

    def cache() -> Cache:
        # Longer than a window, so that a graph with a wrong one runs as well.
        keeps_window = graphs.manifest.cache.window is not None
        return graphs.cache(local_length=max(end, window + 1) if keeps_window else None)

    def run(graph: str, start: int, stop: int, into: Cache) -> NDArray[np.float32]:
        return graphs.run(graph, ids[:, start:stop], into)

    for length in sorted({n for n in (window - 1, window, window + 1) if 0 < n <= end} | {end}):
        yield "score", run("score", 0, length, cache()), logits[:, :length]
        last = logits[:, length - 1 : length]
        yield "prefill", run("prefill", 0, length, cache()), last
    past = cache()
    for start in range(0, end, window + 1):
        stop = min(end, start + window + 1)
        yield "chunks", run("prefill", start, stop, past), logits[:, stop - 1 : stop]
    past = cache()
    behind = max(0, end - window - 6) if end > 64 else 0
    if behind:
        run("prefill", 0, behind, past)
    steps = [run("decode", n, n + 1, past) for n in range(behind, end)]
    yield "decode", np.concatenate(steps, axis=1), logits[:, behind:]
