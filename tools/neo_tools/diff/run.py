"""The comparison: the bundle as it ships, then with its places shown, then the reference."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import neo_runtime
from neo_export.comparison.probed import open_probed, score_trace
from neo_export.comparison.trace import Text
from neo_export.mapped_memory import drop_pages
from neo_export.memory import PeakMemory
from neo_runtime.bundle import open_bundle
from neo_runtime.cores import physical_cores
from neo_runtime.errors import BundleUnsupportedError, RequestError
from neo_runtime.tokenizer import Tokenizer

from neo_tools.diff.cached_path import segments_of, trace_cached_path
from neo_tools.diff.findings import Findings, Written
from neo_tools.diff.position_metrics import PositionMetrics, compare_rows, joined
from neo_tools.diff.probed_backend import ProbedBackend
from neo_tools.diff.references import open_reference, require_same_shape
from neo_tools.diff.shipped import Logits, greedy_continuation, score_logits, stepwise_logits
from neo_tools.diff.summary import summarize
from neo_tools.diff.texts import decode_segments, read_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from neo_export.comparison.faults import Fault
    from neo_runtime import Model
    from neo_runtime.bundle import Bundle
    from numpy.typing import NDArray

    from neo_tools.diff.cached_path import Segment
    from neo_tools.diff.references import Reference
    from neo_tools.diff.results import Results
    from neo_tools.diff.settings import Settings
    from neo_tools.diff.texts import Texts

    Progress = Callable[[str, int, int], None]

__all__ = ["compare", "locate", "trace"]

_LONGEST_PROBED_DECODE = 64
"""Tokens of a stretch of decode whose places are looked at; the logits of all are compared."""
_LONGEST_PROMPT = 64


def compare(settings: Settings, progress: Progress | None = None) -> Results:
    """Do all of it.

    Args:
        settings: what to compare, and how closely.
        progress: called with a stage's name, done and total.

    Raises:
        NeoError: a bundle, a reference or a text cannot be used.
    """
    say = progress or (lambda stage, done, total: None)
    started = time.monotonic()
    threads = settings.threads or physical_cores()
    bundle = open_bundle(settings.bundle)
    with PeakMemory() as memory, open_reference(settings.reference, threads) as reference:
        warnings = require_same_shape(bundle.manifest.model, reference.spec)
        texts = _texts(bundle, settings)
        if reason := _why_not_here(bundle, threads):
            warnings.append(
                f"the bundle cannot be run here ({reason}): what is compared is the graph that its "
                "plans are built from, run by onnxruntime, at every position at once"
            )
            shipped, written = _score_graph(bundle, texts, threads, say), []
        else:
            # Loaded twice: a session maps the weights, and so no more than two are open at once.
            with neo_runtime.load(settings.bundle, threads=threads) as model:
                shipped = _score_all(model, texts, say)
            with neo_runtime.load(settings.bundle, threads=threads) as model:
                _run_steps(model, texts, settings, shipped, say)
                written = _write(model, texts, settings, say)
        traced = trace(bundle, texts.contexts, settings, threads, say)
        findings = _compare_all(reference, traced, shipped, written, bundle, say)
        findings.warnings += [*warnings, *texts.warnings]
        results = summarize(findings, bundle, reference.subject, texts, settings)
    return replace(
        results,
        seconds=time.monotonic() - started,
        peak_rss_bytes=memory.rss,
        peak_private_bytes=memory.private,
    )


def _texts(bundle: Bundle, settings: Settings) -> Texts:
    manifest = bundle.manifest
    longest = manifest.max_length
    context = longest if settings.context is None else settings.context
    if not 2 <= context <= longest:
        raise RequestError(f"--context is {context}, expected 2 to {longest}: the bundle's length")
    tokenizer = Tokenizer(bundle.file("tokenizer.json")) if manifest.has_tokenizer else None
    return read_texts(
        settings.text, tokenizer, manifest.model, tokens=settings.tokens, context=context
    )


def _why_not_here(bundle: Bundle, threads: int) -> str | None:
    """Why a bundle that runs by a plan alone cannot be run on this machine."""
    if bundle.manifest.cache.layout != "static":
        return None
    try:
        neo_runtime.load(bundle.path, threads=threads).close()
    except BundleUnsupportedError as error:
        return str(error)
    return None


def _score_graph(bundle: Bundle, texts: Texts, threads: int, say: Progress) -> list[list[Logits]]:
    """Logits of every text at every position, by onnxruntime from the scoring graph."""
    count = _Count("the graph's logits", texts.tokens, say)
    session = open_probed(bundle.path, bundle.manifest, "score", threads=threads)
    found = []
    for ids in texts.contexts:
        run = score_trace(session, bundle.manifest, ids)
        assert run.logits is not None
        found.append([Logits("score", run.positions, run.logits)])
        drop_pages(run.logits)
        count(len(ids))
    return found


def _segments(
    ids: NDArray[np.int64], window: int, settings: Settings, longest: int | None = None
) -> tuple[Segment, ...]:
    """The path with decode in it; stretches of decode cut to `longest`."""
    decoded = decode_segments(len(ids), window, settings.decode_positions)
    if longest is not None:
        decoded = tuple((start, min(stop, start + longest)) for start, stop in decoded)
    return segments_of(len(ids), decoded, settings.prefill_chunk)


def _score_all(model: Model, texts: Texts, say: Progress) -> list[list[Logits]]:
    """Logits of every text at every position."""
    found = []
    count = _Count("the bundle's logits: score", texts.tokens, say)
    for ids in texts.contexts:
        found.append([score_logits(model, ids)])
        drop_pages(found[-1][0].values)
        count(len(ids))
    return found


def _run_steps(
    model: Model, texts: Texts, settings: Settings, found: list[list[Logits]], say: Progress
) -> None:
    """Adds logits through prefill alone, and with decode in between."""
    window = model.manifest.model.window_size
    count = _Count("the bundle's logits: prefill and decode", 2 * texts.tokens, say)
    for ids, logits in zip(texts.contexts, found, strict=True):
        chunks = segments_of(len(ids), (), settings.prefill_chunk)
        logits += stepwise_logits(model, ids, chunks, count)
        logits += stepwise_logits(model, ids, _segments(ids, window, settings), count)


def _write(model: Model, texts: Texts, settings: Settings, say: Progress) -> list[Written]:
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


def locate(
    bundle: Bundle,
    reference: Reference,
    contexts: Sequence[NDArray[np.int64]],
    settings: Settings,
) -> list[Fault]:
    """Only the places: those that are off, in the order of computation.

    Args:
        bundle: opened.
        reference: opened.
        contexts: token ids [S] each.
        settings: how closely to look.
    """
    threads = settings.threads or physical_cores()
    texts = trace(bundle, contexts, settings, threads, lambda stage, done, total: None)
    errors = reference.run(texts, lambda done, total: None, bundle)
    for number, text in enumerate(texts):
        reference.add_logits(errors, text, reference.logits(number))
    return reference.faults(errors, bundle.manifest, texts)


def trace(
    bundle: Bundle,
    contexts: Sequence[NDArray[np.int64]],
    settings: Settings,
    threads: int,
    say: Progress,
) -> list[Text]:
    """The first contexts with their places shown, the others without."""
    window = bundle.manifest.model.window_size
    chosen = _localized(contexts, settings.localize_tokens)
    count = _Count("the bundle's places", 3 * sum(map(len, chosen)), say)
    result = [Text(ids) for ids in contexts]
    session = open_probed(bundle.path, bundle.manifest, "score", threads=threads)
    for text in result[: len(chosen)]:
        text.traces = [score_trace(session, bundle.manifest, text.ids)]
        text.traces[0].rest()
        count(len(text.ids))
    del session
    if not chosen or bundle.manifest.cache.layout == "static":
        return result
    backend = ProbedBackend(bundle, threads=threads)
    for text in result[: len(chosen)]:
        chunks = segments_of(len(text.ids), (), settings.prefill_chunk)
        whole, checks = trace_cached_path(backend, text.ids, chunks, count)
        mixed = _segments(text.ids, window, settings, _LONGEST_PROBED_DECODE)
        parts, more = trace_cached_path(backend, text.ids, mixed, count)
        # Prefill is looked at where it runs alone; here it only leads from one stretch to the next.
        decoded = [trace for trace in parts if trace.graph == "decode"]
        text.traces = [*text.traces, *whole, *decoded]
        text.cache_checks = [*checks, *more]
    backend.close()
    return result


def _localized(contexts: Sequence[NDArray[np.int64]], tokens: int) -> list[NDArray[np.int64]]:
    """As many contexts as fit `tokens`, at least the first; none for 0."""
    if tokens <= 0:
        return []
    chosen = [contexts[0]]
    for ids in contexts[1:]:
        if sum(map(len, chosen)) + len(ids) > tokens:
            break
        chosen.append(ids)
    return chosen


def _compare_all(
    reference: Reference,
    traced: Sequence[Text],
    shipped: Sequence[Sequence[Logits]],
    written: Sequence[Written],
    bundle: Bundle,
    say: Progress,
) -> Findings:
    stage = "the reference, layer by layer"
    texts = [*traced, *(Text(one.ids) for one in written)]
    errors = reference.run(texts, lambda done, total: say(stage, done, total), bundle)
    parts: dict[str, list[PositionMetrics]] = {}
    for number, (text, logits) in enumerate(zip(traced, shipped, strict=True)):
        say("comparing logits", number, len(texts))
        expected = reference.logits(number)
        for part in logits:
            whole = len(part.positions) == len(expected)
            rows = expected if whole else expected[part.positions]
            compared = compare_rows(number, text.ids, part.positions, part.values, rows)
            parts.setdefault(part.graph, []).append(compared)
            drop_pages(part.values)
        reference.add_logits(errors, text, expected)
    best = []
    for number in range(len(traced), len(texts)):
        say("comparing logits", number, len(texts))
        best.append(reference.logits(number).argmax(axis=-1))
    say("comparing logits", len(texts), len(texts))
    return Findings(
        metrics={graph: joined(some) for graph, some in parts.items()},
        errors=errors,
        faults=reference.faults(errors, bundle.manifest, traced),
        localized_tokens=sum(len(text.ids) for text in traced if text.traces),
        written=list(written),
        best_of_reference=best,
    )


class _Count:
    """Adds up what was done of one stage, and reports it."""

    def __init__(self, stage: str, total: int, say: Progress) -> None:
        self._stage, self._total, self._say, self._done = stage, total, say, 0
        say(stage, 0, total)

    def __call__(self, done: int) -> None:
        self._done = min(self._total, self._done + done)
        self._say(self._stage, self._done, self._total)
