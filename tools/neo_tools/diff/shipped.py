"""The bundle as it ships: logits of every position, through each of its graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from neo_export.files.mapped_memory import drop_pages, scratch_array
from neo_runtime.errors import CacheLimitError

from neo_tools.diff.cached_path import segments_of, spoil
from neo_tools.diff.engine import open_probed_backend
from neo_tools.diff.findings import Written
from neo_tools.diff.progress import Count
from neo_tools.diff.texts import decode_segments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from neo_runtime import Model
    from neo_runtime.bundle.folder import Bundle
    from numpy.typing import NDArray

    from neo_tools.diff.cached_path import Segment
    from neo_tools.diff.engine import Engine
    from neo_tools.diff.progress import Progress
    from neo_tools.diff.settings import Settings
    from neo_tools.diff.texts import Texts

__all__ = [
    "Logits",
    "batch_logits",
    "greedy_continuation",
    "path_of",
    "run_steps",
    "score_all",
    "score_graph",
    "score_logits",
    "stepwise_logits",
    "write_texts",
]

_LONGEST_PROMPT = 64
_BATCH_STEPS = 8


@dataclass(frozen=True)
class Logits:
    """Logits of one graph at some positions of one text."""

    graph: str
    positions: NDArray[np.int64]
    """[n]"""
    values: NDArray[np.float32]
    """[n, V]; large arrays are memory-mapped from a file."""


def score_logits(model: Model, ids: NDArray[np.int64]) -> Logits:
    """Logits of every position, in one call."""
    values = scratch_array((len(ids), model.manifest.model.vocab_size), "float32")
    values[:] = model.logits(ids)
    return Logits("score", np.arange(len(ids), dtype=np.int64), values)


def stepwise_logits(
    model: Model,
    ids: NDArray[np.int64],
    segments: Sequence[Segment],
    step: Callable[[int], None] = lambda tokens: None,
) -> list[Logits]:
    """Logits with one cache: at the last position of each prefill call, and all decoded positions.

    Args:
        model: the bundle.
        ids: token ids [S].
        segments: segments that cover the positions from 0 on without a gap.
        step: called with the number of tokens done since the last call.
    """
    found: dict[str, list[tuple[int, NDArray[np.float32]]]] = {"prefill": [], "decode": []}
    with model.new_cache(1, model.rounded_length(segments[-1].stop)) as cache:
        spoil(cache.store)
        for segment in segments:
            part = ids[segment.start : segment.stop]
            if segment.graph == "prefill":
                row = model.prefill(cache, [part])[0].copy()
                found["prefill"].append((segment.stop - 1, row))
                step(len(part))
                continue
            for at, token in enumerate(part, start=segment.start):
                found["decode"].append((at, model.decode(cache, [int(token)])[0].copy()))
                step(1)
    return [
        Logits(graph, np.array([at for at, _ in rows]), np.stack([row for _, row in rows]))
        for graph, rows in found.items()
        if rows
    ]


def batch_logits(
    model: Model, contexts: Sequence[NDArray[np.int64]]
) -> tuple[dict[int, Logits], str | None]:
    """Logits of a ragged batch of contexts' beginnings: a prompt each, then decode of true tokens.

    One prompt ends just before a decode step evicts from a local layer's cache, one within the
    window, one after a few tokens.

    Args:
        model: the bundle.
        contexts: token ids [S] each, at least two tokens.

    Returns:
        Logits by the context's number; if there are none, the reason, otherwise None.
    """
    window = model.manifest.model.window_size
    new = min(_BATCH_STEPS, *(len(ids) - 1 for ids in contexts))
    rows = [
        (number % len(contexts), max(1, min(length, len(contexts[number % len(contexts)]) - new)))
        for number, length in enumerate((window + window // 4 - 2, window // 2 + 1, 5))
    ]
    found: dict[int, list[tuple[int, NDArray[np.float32]]]] = {}
    longest = max(prompt for _, prompt in rows) + new
    try:
        with model.new_cache(len(rows), model.rounded_length(longest)) as cache:
            spoil(cache.store)
            logits = model.prefill(cache, [contexts[of][:prompt] for of, prompt in rows])
            for step in range(new + 1):
                for (of, prompt), row in zip(rows, logits, strict=True):
                    found.setdefault(of, []).append((prompt + step - 1, row.copy()))
                if step < new:
                    tokens = [int(contexts[of][prompt + step]) for of, prompt in rows]
                    logits = model.decode(cache, tokens)
    except CacheLimitError as error:  # a plan for single sequences
        return {}, f"batches are not compared: {error}"
    return {
        of: Logits("batch", np.array([at for at, _ in some]), np.stack([row for _, row in some]))
        for of, some in found.items()
    }, None


def greedy_continuation(model: Model, prompt: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    """The prompt and the bundle's greedy continuation: [S + tokens]."""
    written = list(prompt)
    with model.new_cache(1, model.rounded_length(len(prompt) + tokens)) as cache:
        logits = model.prefill(cache, [prompt])
        for _ in range(tokens):
            written.append(int(logits[0].argmax()))
            if len(written) < len(prompt) + tokens:
                logits = model.decode(cache, written[-1:])
    return np.array(written, dtype=np.int64)


def path_of(
    ids: NDArray[np.int64], window: int, settings: Settings, longest: int | None = None
) -> tuple[Segment, ...]:
    """Segments that include decode, with stretches of decode cut to `longest` tokens."""
    decoded = decode_segments(len(ids), window, settings.decode_positions)
    if longest is not None:
        decoded = tuple((start, min(stop, start + longest)) for start, stop in decoded)
    return segments_of(len(ids), decoded, settings.prefill_chunk)


def score_graph(bundle: Bundle, texts: Texts, engine: Engine, say: Progress) -> list[list[Logits]]:
    """Logits of every text at every position, with onnxruntime and the scoring graph."""
    count = Count("the graph's logits", texts.tokens, say)
    found = []
    with open_probed_backend(bundle, engine) as backend:
        for ids in texts.contexts:
            run = backend.score_trace(ids)
            assert run.logits is not None
            found.append([Logits("score", run.positions, run.logits)])
            drop_pages(run.logits)
            count(len(ids))
    return found


def score_all(model: Model, texts: Texts, say: Progress) -> list[list[Logits]]:
    """Logits of every text at every position."""
    found = []
    count = Count("the bundle's logits: score", texts.tokens, say)
    for ids in texts.contexts:
        found.append([score_logits(model, ids)])
        drop_pages(found[-1][0].values)
        count(len(ids))
    return found


def run_steps(
    model: Model, texts: Texts, settings: Settings, found: list[list[Logits]], say: Progress
) -> list[str]:
    """Add logits of prefill alone, of prefill with decode, and of a batch; returns warnings."""
    window = model.manifest.model.window_size
    count = Count("the bundle's logits: prefill and decode", 2 * texts.tokens, say)
    for ids, logits in zip(texts.contexts, found, strict=True):
        chunks = segments_of(len(ids), (), settings.prefill_chunk)
        logits += stepwise_logits(model, ids, chunks, count)
        logits += stepwise_logits(model, ids, path_of(ids, window, settings), count)
    together, warning = batch_logits(model, texts.contexts)
    for number, rows in together.items():
        found[number].append(rows)
    return [] if warning is None else [warning]


def write_texts(model: Model, texts: Texts, settings: Settings, say: Progress) -> list[Written]:
    """Greedy continuations of the first contexts' beginnings."""
    written = []
    for number, ids in enumerate(texts.contexts[: settings.continuations]):
        prompt = min(_LONGEST_PROMPT, max(1, len(ids) // 2))
        new = min(settings.new_tokens, model.manifest.max_length - prompt)
        say("greedy texts", number, min(len(texts.contexts), settings.continuations))
        if new > 0:
            whole = greedy_continuation(model, ids[:prompt], new)
            written.append(Written(number, prompt, whole))
    return written
