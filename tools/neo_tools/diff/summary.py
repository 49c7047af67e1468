"""Summarizes the arrays of the findings as plain results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from neo_export.comparison.places import all_places, region_masks
from neo_export.tolerances import quality_of
from neo_runtime.text.tokenizer import Tokenizer

from neo_tools.diff.position_metrics import perplexity, summaries
from neo_tools.diff.results import (
    Continuation,
    PlaceSummary,
    Results,
    Subject,
    TokenError,
)
from neo_tools.diff.thresholds import checks
from neo_tools.worker.versions import versions_of

if TYPE_CHECKING:
    from neo_runtime.bundle.folder import Bundle
    from neo_runtime.bundle.manifest import ModelSpec

    from neo_tools.diff.engine import Engine
    from neo_tools.diff.findings import Findings
    from neo_tools.diff.position_metrics import PositionMetrics
    from neo_tools.diff.settings import Settings
    from neo_tools.diff.texts import Texts

__all__ = ["summarize"]

_WORST_TOKENS = 12
_AROUND = 24
"""Tokens of context that are shown on either side of an affected token."""
_BINS = 40
_PACKAGES = (
    "neo-onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "torch",
    "transformers",
    "numpy",
)


def summarize(
    findings: Findings,
    bundle: Bundle,
    reference: Subject,
    texts: Texts,
    settings: Settings,
    engine: Engine,
) -> Results:
    """The results, with seconds and memory still zero."""
    manifest = bundle.manifest
    model, scored = manifest.model, findings.metrics["score"]
    graphs = [
        part
        for graph, found in findings.metrics.items()
        for part in summaries(graph, found, model.window_size)
    ]
    whole = perplexity(scored)
    judged = checks(settings.limits, quality_of(manifest), graphs, whole, findings.faults)
    tokenizer = Tokenizer(bundle.file("tokenizer.json"))
    return Results(
        bundle=Subject(
            path=str(bundle.path),
            kind="bundle",
            precision=manifest.precision,
            target=manifest.target,
            digest=manifest.digest,
            backend=engine.backend,
            runs_on=engine.runs_on,
        ),
        reference=reference,
        text=texts.source,
        contexts=tuple(map(len, texts.contexts)),
        window_size=model.window_size,
        attention_layers=model.attention_layers,
        settings={
            "decode_positions": settings.decode_positions,
            "prefill_chunk": settings.prefill_chunk,
            "localize_tokens": settings.localize_tokens,
        },
        graphs=tuple(graphs),
        perplexity=whole,
        continuations=tuple(_continuations(findings, tokenizer)),
        localized_tokens=findings.localized_tokens,
        places=tuple(_places(findings, model)),
        first_fault=findings.faults[0] if findings.faults else None,
        faults=tuple(findings.faults),
        checks=judged,
        passed=all(check.passed for check in judged),
        worst_tokens=tuple(_worst_tokens(scored, texts, tokenizer)),
        positions=_positions(scored),
        kl_histogram=_histogram(scored),
        warnings=tuple(findings.warnings),
        seconds=0.0,
        peak_rss_bytes=0,
        peak_private_bytes=0,
        versions=versions_of(_PACKAGES),
    )


def _continuations(findings: Findings, tokenizer: Tokenizer) -> list[Continuation]:
    """Where the greedy texts of bundle and reference diverge.

    Up to the first difference both have the same input, so one run of the reference over the
    bundle's text gives its own greedy tokens.
    """
    result = []
    for one, best in zip(findings.written, findings.best_of_reference, strict=True):
        wrote, would = one.ids[one.prompt :], best[one.prompt - 1 : -1]
        differs = np.flatnonzero(wrote != would)
        parted = int(differs[0]) if len(differs) else None
        result.append(
            Continuation(
                context=one.context,
                prompt_tokens=one.prompt,
                tokens=len(wrote),
                parted_after=parted,
                bundle_text=tokenizer.decode(wrote.tolist(), skip_special_tokens=False),
                reference_token=None if parted is None else tokenizer.token(int(would[parted])),
            )
        )
    return result


def _places(findings: Findings, model: ModelSpec) -> list[PlaceSummary]:
    result = []
    for graph in findings.errors.graphs:
        for layer, place in all_places(model):
            series = findings.errors.series(graph, (layer, place))
            if series is None:
                continue
            masks = region_masks(series.positions, model.window_size)
            for region, mask in masks.items():
                known = mask & ~np.isnan(series.local) if place.startswith("cached") else mask
                if not known.any():
                    continue
                local, cumulative = series.local[known], series.cumulative[known]
                result.append(
                    PlaceSummary(
                        graph=graph,
                        layer=layer,
                        place=place,
                        region=region,
                        positions=int(known.sum()),
                        local_median=float(np.median(local)),
                        local_max=float(np.max(local)),
                        cumulative_median=float(np.median(cumulative)),
                        cumulative_max=float(np.max(cumulative)),
                    )
                )
    return result


def _worst_tokens(found: PositionMetrics, texts: Texts, tokenizer: Tokenizer) -> list[TokenError]:
    result = []
    order = np.argsort(-np.nan_to_num(found.kl, nan=np.inf), kind="stable")
    for index in order[:_WORST_TOKENS]:
        if not found.kl[index] > 0 and not np.isnan(found.kl[index]):
            break
        context, at = int(found.context[index]), int(found.position[index])
        ids = texts.contexts[context]
        result.append(
            TokenError(
                context=context,
                position=at,
                before=tokenizer.decode(
                    ids[max(0, at - _AROUND) : at].tolist(), skip_special_tokens=False
                ),
                token=tokenizer.token(int(ids[at])),
                after=tokenizer.decode(
                    ids[at + 1 : at + 1 + _AROUND].tolist(), skip_special_tokens=False
                ),
                kl=float(found.kl[index]),
                reference_best=tokenizer.token(int(found.best_reference[index])),
                bundle_best=tokenizer.token(int(found.best_bundle[index])),
            )
        )
    return result


def _positions(found: PositionMetrics) -> dict[str, list[Any]]:
    arrays = {
        "context": found.context,
        "position": found.position,
        "token": found.token,
        "kl": found.kl,
        "top_1": found.top_1,
        "top_5": found.top_5,
        "nll_reference": found.nll_reference,
        "nll_bundle": found.nll_bundle,
        "logit_error": found.logit_error,
    }
    for error, start in (("absolute", 0), ("relative", 4)):
        for offset, kind in enumerate(("max", "mean", "median", "p99")):
            arrays[f"{error}_{kind}"] = found.errors[:, start + offset]
    return {name: array.tolist() for name, array in arrays.items()}


def _histogram(found: PositionMetrics) -> dict[str, list[float]]:
    """Bins of equal width in log10, from the smallest to the largest; the first includes 0."""
    kl = found.kl[np.isfinite(found.kl)]
    positive = kl[kl > 0]
    if not len(positive):
        return {"edges": [0.0, 1e-12], "counts": [len(kl)]}
    low, high = np.log10(max(positive.min(), 1e-12)), np.log10(positive.max())
    edges = np.logspace(low, max(high, low + 0.1), _BINS + 1)
    counts, _ = np.histogram(np.clip(kl, edges[0], edges[-1]), edges)
    return {"edges": [0.0, *edges[1:].tolist()], "counts": counts.tolist()}
