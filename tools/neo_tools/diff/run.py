"""Runs a comparison: the bundle as it ships, then with probed places, then the reference."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import neo_runtime
from neo_export.comparison.trace import Text
from neo_export.files.mapped_memory import drop_pages
from neo_export.reports.memory import PeakMemory
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.errors import BundleUnsupportedError, RequestError
from neo_runtime.machine.cores import physical_cores
from neo_runtime.text.tokenizer import Tokenizer

from neo_tools.diff.cached_path import segments_of, trace_cached_path
from neo_tools.diff.engine import Engine, open_probed_backend, shown_elsewhere, why_not_shown
from neo_tools.diff.findings import Findings, Written
from neo_tools.diff.position_metrics import PositionMetrics, compare_rows, joined
from neo_tools.diff.progress import Count
from neo_tools.diff.references import open_reference, require_same_shape
from neo_tools.diff.shipped import (
    path_of,
    run_steps,
    score_all,
    score_graph,
    write_texts,
)
from neo_tools.diff.summary import summarize
from neo_tools.diff.texts import read_texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from neo_runtime import Model
    from neo_runtime.bundle.folder import Bundle
    from numpy.typing import NDArray

    from neo_tools.diff.progress import Progress
    from neo_tools.diff.references import Reference
    from neo_tools.diff.results import Results
    from neo_tools.diff.settings import Settings
    from neo_tools.diff.shipped import Logits
    from neo_tools.diff.texts import Texts

__all__ = ["compare", "trace"]

_LONGEST_PROBED_DECODE = 64
"""Longest stretch of decode whose places are compared, in tokens; all logits are compared."""


def compare(settings: Settings, progress: Progress | None = None) -> Results:
    """Run the whole comparison.

    Args:
        settings: the settings of the comparison.
        progress: called with a stage's name, done and total.

    Raises:
        NeoError: a bundle, a reference or a text cannot be used.
    """
    say = progress or (lambda stage, done, total: None)
    started = time.monotonic()
    threads = settings.threads or physical_cores()
    bundle = open_bundle(settings.bundle, verify=True, check_runtime=False)
    with (
        PeakMemory() as memory,
        open_reference(settings.reference, threads, settings.device, settings.base) as reference,
    ):
        warnings = require_same_shape(bundle.manifest.model, reference.spec)
        texts = _texts(bundle, settings)
        if reason := _why_not_here(bundle, settings):
            engine = Engine(threads=threads)
            warnings.append(
                f"no plan is run ({reason}): what is compared is the graph that plans are built "
                "from, run by onnxruntime on the CPU, at every position at once"
            )
            shipped, written = score_graph(bundle, texts, engine, say), []
        else:
            # Loaded twice: a session maps the weights; so at most two sessions are open at once.
            with _load(settings) as model:
                engine = Engine.of(model, settings.device, threads)
                shipped = score_all(model, texts, say)
            # With the backend named: "auto" would report its choice a second time.
            with _load(replace(settings, backend=engine.backend)) as model:
                warnings += run_steps(model, texts, settings, shipped, say)
                written = write_texts(model, texts, settings, say)
        traced = trace(bundle, texts.contexts, settings, engine, say)
        findings = _compare_all(reference, traced, shipped, written, bundle, say)
        if settings.localize_tokens and (warning := shown_elsewhere(bundle, engine)):
            warnings.append(warning)
        findings.warnings += [*warnings, *reference.warnings, *texts.warnings]
        results = summarize(findings, bundle, reference.subject, texts, settings, engine)
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


def _load(settings: Settings) -> Model:
    return neo_runtime.load(
        settings.bundle,
        backend=settings.backend,
        device=settings.device,
        threads=settings.threads or physical_cores(),
    )


def _why_not_here(bundle: Bundle, settings: Settings) -> str | None:
    """Why a bundle that needs a plan is not run: no plan, no GPU, or another backend requested."""
    if bundle.manifest.cache.layout != "static" or settings.backend not in ("auto", "cpu"):
        return None
    if settings.backend == "cpu" and bundle.manifest.cache.dtype != "bfloat16":
        return "the CPU was asked for, and plans run on a GPU"
    try:
        _load(settings).close()
    except BundleUnsupportedError as error:
        if bundle.manifest.cache.dtype == "bfloat16":  # the graph does not run on a CPU, either
            raise
        return str(error)
    return None


def trace(
    bundle: Bundle,
    contexts: Sequence[NDArray[np.int64]],
    settings: Settings,
    engine: Engine,
    say: Progress,
) -> list[Text]:
    """Texts for all contexts; the first ones have traces of their places."""
    window = bundle.manifest.model.window_size
    result = [Text(ids) for ids in contexts]
    chosen = result[: len(_localized(contexts, settings.localize_tokens))]
    if not chosen or why_not_shown(bundle, engine):
        return result
    count = Count("the bundle's places", 3 * sum(len(text.ids) for text in chosen), say)
    with open_probed_backend(bundle, engine) as backend:
        for text in chosen:
            text.traces = [backend.score_trace(text.ids)]
            text.traces[0].rest()
            count(len(text.ids))
    if bundle.manifest.cache.layout == "static":
        return result
    with open_probed_backend(bundle, engine) as backend:
        for text in chosen:
            chunks = segments_of(len(text.ids), (), settings.prefill_chunk)
            whole, checks = trace_cached_path(backend, text.ids, chunks, count)
            mixed = path_of(text.ids, window, settings, _LONGEST_PROBED_DECODE)
            parts, more = trace_cached_path(backend, text.ids, mixed, count)
            # Prefill is compared in its own run; here it only leads to the next stretch of decode.
            decoded = [trace for trace in parts if trace.graph == "decode"]
            text.traces = [*text.traces, *whole, *decoded]
            text.cache_checks = [*checks, *more]
    return result


def _localized(contexts: Sequence[NDArray[np.int64]], tokens: int) -> list[NDArray[np.int64]]:
    """The first contexts that fit into `tokens`, at least one; none for 0."""
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
