"""Computes the reported figures from the measurements: rates, shares of the limit, ratios."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_tools.bench.results import Ratio, Row
from neo_tools.bench.spread import percentile, round_ratios, spread
from neo_tools.bench.traffic import (
    cache_bytes_per_step,
    decode_flops,
    nominal_weights,
    prefill_flops,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from neo_tools.bench.cases import Case
    from neo_tools.bench.opening import BundleInfo
    from neo_tools.bench.participants import Participant
    from neo_tools.bench.rounds import CaseRecord
    from neo_tools.bench.spread import Spread

__all__ = ["FLOAT32_DECODE", "make_ratios", "make_row", "with_limits"]

FLOAT32_DECODE = "float32 decode"

_PEER_CACHE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp16-compiled": 2}
"""Bytes of a cache element by precision, if the peer does not tell."""
_OPENVINO_TYPES = {"f32": 4, "float32": 4, "f16": 2, "float16": 2, "bf16": 2, "u8": 1, "uint8_t": 1}


def make_row(
    case: Case, participant: Participant, measured: CaseRecord, bundles: Sequence[BundleInfo]
) -> Row:
    """The row of one participant in one case; `with_limits` adds shares of the limit later."""
    seconds = measured.seconds
    is_decode = case.kind == "decode"
    memory, overhead = measured.memory, measured.overhead
    weights, cache_bytes = _reads(case, participant, bundles)
    step_bytes = weights + cache_bytes if is_decode else None
    step_seconds = median(seconds) / max(1, case.new_tokens)
    return Row(
        label=participant.label,
        kind="peer" if participant.kind == "peer" else "bundle",
        precision=participant.precision,
        test=case.name,
        threads=case.threads,
        batch=case.batch,
        prompt=case.prompt,
        new_tokens=case.new_tokens,
        depth=case.depth,
        round_seconds=seconds,
        tokens_per_second=spread([case.tokens / total for total in seconds]),
        first_token_seconds=None if is_decode else median(seconds),
        token_p50_seconds=percentile(measured.steps, 50) if is_decode else None,
        token_p99_seconds=percentile(measured.steps, 99) if is_decode else None,
        private_bytes=memory.rss_anon if memory else None,
        proportional_bytes=memory.pss if memory else None,
        cache_bytes=measured.cache_bytes,
        weight_bytes=weights,
        step_bytes=step_bytes,
        bytes_are_nominal=participant.kind == "peer",
        flops=_flops(case, bundles),
        read_rate=None if step_bytes is None else step_bytes / step_seconds,
        limit_share=None,
        round_limit_share=_round_shares(step_bytes, case.new_tokens, measured),
        python_seconds=overhead.step if overhead else None,
        generate_python_seconds=overhead.generate if overhead else None,
        device_bytes=measured.device_bytes,
    )


def with_limits(
    rows: Sequence[Row], read: Mapping[str, float]
) -> tuple[list[Row], dict[str, float]]:
    """Fill in the shares of the limit.

    The rate of float32 decode is a measurement of the machine, too, and is the limit if it is
    higher than the kernels' rates. (It counts only the bytes that must be read.) The kernels' rates
    are the best of all their measurements, while a row's rate is that of its median round: this
    difference explains part of a share below 1.

    Args:
        rows: all rows of the run with one number of threads.
        read: bytes per second by kernel.

    Returns:
        The rows, and `read` with the float32 decode if there is one.
    """
    rates = [row.read_rate for row in rows if row.kind == "bundle" and row.precision == "fp32"]
    known = [rate for rate in rates if rate is not None]
    best = dict(read) | ({FLOAT32_DECODE: max(known)} if known else {})
    limit = max(best.values())
    filled = [
        row if row.read_rate is None else replace(row, limit_share=row.read_rate / limit)
        for row in rows
    ]
    return filled, best


def make_ratios(
    case: Case, participants: Sequence[Participant], measured: Mapping[str, CaseRecord]
) -> list[Ratio]:
    """Every peer against every bundle, and the first bundle against the others."""
    bundles = [p.label for p in participants if p.kind == "bundle"]
    pairs = [
        (peer.label, bundle) for peer in participants if peer.kind == "peer" for bundle in bundles
    ]
    pairs += [(bundles[0], other) for other in bundles[1:]]
    found = []
    for other, bundle in pairs:
        rounds = round_ratios(measured[other].seconds, measured[bundle].seconds)
        found.append(
            Ratio(
                test=case.name,
                threads=case.threads,
                batch=case.batch,
                other=other,
                bundle=bundle,
                rounds=tuple(rounds),
                spread=spread(rounds),
            )
        )
    return found


def _round_shares(step_bytes: float | None, steps: int, measured: CaseRecord) -> Spread | None:
    if step_bytes is None:
        return None
    pairs = zip(measured.seconds, measured.readings, strict=True)
    return spread([step_bytes * steps / seconds / reading for seconds, reading in pairs])


def _flops(case: Case, bundles: Sequence[BundleInfo]) -> float:
    model = bundles[0].manifest.model
    if case.kind == "prefill":
        return prefill_flops(model, batch=case.batch, length=case.prompt)
    return decode_flops(model, batch=case.batch, depth=case.depth, steps=case.new_tokens)


def _reads(
    case: Case, participant: Participant, bundles: Sequence[BundleInfo]
) -> tuple[int, float]:
    """Bytes that a step reads: of weights, and of keys and values (0 for a prefill)."""
    if participant.kind == "bundle":
        [info] = [info for info in bundles if info.label == participant.label]
        weights, model = info.weights, info.manifest.model
        kind = info.manifest.cache.dtype
        itemsize = 2 if kind == "bfloat16" else np.dtype(kind).itemsize
    else:
        model = bundles[0].manifest.model
        weights = nominal_weights(model, participant.precision)
        details = participant.loaded.details if participant.loaded else {}
        itemsize = _peer_cache_itemsize(participant.precision, details)
    if case.kind == "prefill":
        return weights.total(case.batch), 0.0
    cache = cache_bytes_per_step(
        model, itemsize=itemsize, batch=case.batch, depth=case.depth, steps=case.new_tokens
    )
    return weights.total(case.batch), cache


def _peer_cache_itemsize(precision: str, details: Mapping[str, Any]) -> int:
    """Bytes of a peer's cache element: as it reports (OpenVINO: `<Type: 'uint8_t'>`), or usual."""
    said = str(details.get("KV_CACHE_PRECISION", "")).lower()
    for name, size in _OPENVINO_TYPES.items():
        if name in said:
            return size
    return _PEER_CACHE_BYTES.get(precision, 4)
