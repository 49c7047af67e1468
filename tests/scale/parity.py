"""A bundle's logits against the stored reference, through the runtime's own calls.

A process of its own. Each case loads the bundle anew, so that no more graphs are in memory at once
than it needs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np

from .comparison import Comparison, relative_l2

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from neo_runtime import KVCache, Model
    from numpy.typing import NDArray

__all__ = ["CASES"]

CHUNK = 512
"""Tokens of a prompt that go through the graph at once."""


def score(model: Model, ids: NDArray[np.int64], comparison: Comparison) -> None:
    """Every position of texts that end just before, at and behind the window, and of the whole."""
    for length in _lengths(model, ids):
        comparison.add(model.logits(ids[:length]), 0)


def prefill(model: Model, ids: NDArray[np.int64], comparison: Comparison) -> None:
    """Whole prompts, in one piece each: a single token, and lengths around the window."""
    for length in (1, *_lengths(model, ids)[:-1]):
        with model.new_cache(1, length) as cache:
            comparison.add(model.prefill(cache, [ids[:length]]), length - 1)


def chunked(model: Model, ids: NDArray[np.int64], comparison: Comparison) -> None:
    """One prompt in chunks, to the last position."""
    with model.new_cache(1, len(ids)) as cache:
        for start in range(0, len(ids), CHUNK):
            _prefill_up_to(model, cache, ids, start + CHUNK, comparison)


def decode(model: Model, ids: NDArray[np.int64], comparison: Comparison) -> None:
    """Single steps at the beginning, across the window, and at the end; prompts in between."""
    window, end = model.manifest.model.window_size, len(ids)
    with model.new_cache(1, end) as cache:
        for first, last in ((0, 3), (window - 2, window + 3), (end - 3, end)):
            _prefill_up_to(model, cache, ids, first, comparison)
            _decode_up_to(model, cache, ids, last, comparison)


def every_step(model: Model, ids: NDArray[np.int64], comparison: Comparison) -> None:
    """One step after another from an empty cache to the last position."""
    with model.new_cache(1, len(ids)) as cache:
        _decode_up_to(model, cache, ids, len(ids), comparison)


CASES: dict[str, Callable[[Model, NDArray[np.int64], Comparison], None]] = {
    "score": score,
    "prefill": prefill,
    "chunked prefill": chunked,
    "decode": decode,
    "decode, every step": every_step,
}


def _lengths(model: Model, ids: NDArray[np.int64]) -> tuple[int, ...]:
    window = model.manifest.model.window_size
    return (window - 1, window, window + 1, len(ids))


def _prefill_up_to(
    model: Model, cache: KVCache, ids: NDArray[np.int64], end: int, comparison: Comparison
) -> None:
    start, end = int(cache.lengths[0]), min(end, len(ids))
    if start < end:
        comparison.add(model.prefill(cache, [ids[start:end]]), end - 1)


def _decode_up_to(
    model: Model, cache: KVCache, ids: NDArray[np.int64], end: int, comparison: Comparison
) -> None:
    for position in range(int(cache.lengths[0]), end):
        comparison.add(model.decode(cache, ids[position : position + 1]), position)
        if position % 256 == 255:
            print(f"decoded {position + 1} of {end}", file=sys.stderr, flush=True)


def compare(
    bundle: Path, ids_file: Path, logits_file: Path, length: int | None, cases: Sequence[str]
) -> dict[str, Any]:
    """Run the cases.

    Args:
        bundle: made by `neo-export`.
        ids_file: token ids [n].
        logits_file: the reference's logits [n, vocabulary].
        length: how much of the text to use; None for all.
        cases: names of `CASES`.
    """
    ids = np.load(ids_file)[:length]
    reference = np.load(logits_file, mmap_mode="r")
    found = []
    for name in cases:
        comparison = Comparison(name, reference)
        with neo_runtime.load(bundle, prefill_chunk=CHUNK) as model:
            precision = model.manifest.precision
            CASES[name](model, ids, comparison)
        found.append(comparison.to_json())
        print(f"{name}: {found[-1]}", file=sys.stderr, flush=True)
    return {"precision": precision, "tokens": len(ids), "cases": found}


def against_exact(bundle: Path, ids_file: Path, logits_file: Path, exact_file: Path) -> Any:
    """How far the bundle and the reference are from float64: worst relative L2 and median."""
    exact = np.load(exact_file, mmap_mode="r")
    reference = np.load(logits_file, mmap_mode="r")[: len(exact)]
    with neo_runtime.load(bundle) as model:
        found = model.logits(np.load(ids_file)[: len(exact)])
    errors = {"bundle": relative_l2(found, exact), "reference": relative_l2(reference, exact)}
    worst = {name: float(error.max()) for name, error in errors.items()}
    median = {name: float(np.median(error)) for name, error in errors.items()}
    return {"tokens": len(exact), "worst": worst, "median": median}


def main() -> None:
    """`python -m tests.scale.parity BUNDLE --ids F --logits F --output JSON`."""
    parser = argparse.ArgumentParser(prog="python -m tests.scale.parity", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--logits", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--exact", type=Path, help="logits in float64, of a part of the text")
    parser.add_argument("--length", type=int, help="tokens of the text to use (default: all)")
    parser.add_argument("--case", action="append", choices=CASES, help="default: all of them")
    arguments = parser.parse_args()
    result = compare(
        arguments.bundle,
        arguments.ids,
        arguments.logits,
        arguments.length,
        arguments.case or list(CASES),
    )
    if arguments.exact is not None:
        result["exact"] = against_exact(
            arguments.bundle, arguments.ids, arguments.logits, arguments.exact
        )
    arguments.output.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
