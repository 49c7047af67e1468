"""What a loaded bundle costs: seconds to the first token, and memory once all graphs are in use.

A process of its own, so that nothing else is in the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neo_runtime import Model

PROMPT = 128
STEPS = 16


def probe(bundle: Path) -> dict[str, Any]:
    """Load, generate from a prompt of 128 tokens, score it; seconds and bytes on the way."""
    started = time.perf_counter()
    import neo_runtime

    with neo_runtime.load(bundle) as model:
        loaded = time.perf_counter()
        facts: dict[str, Any] = {
            "load_seconds": loaded - started,
            "memory_after_load": memory(),
            "cache_bytes": model.cache_bytes(1, PROMPT + STEPS),
            "weight_bytes": model.manifest.files["weights.bin"].size,
        }
        first_token, _ = _generate(model)
        facts["first_token_seconds"] = first_token
        facts["first_token_seconds_from_start"] = time.perf_counter() - started
        model.logits(_prompt(model))
        facts["memory_with_all_graphs"] = memory()
        facts["first_token_seconds_warm"], facts["decode_seconds_warm"] = _generate(model)
        facts["memory_at_the_end"] = memory()
    return facts


def _prompt(model: Model) -> list[int]:
    return [(7919 * i + 13) % model.manifest.model.vocab_size for i in range(PROMPT)]


def _generate(model: Model) -> tuple[float, float]:
    """Seconds to the first token (greedy choice included), and a decode step's median."""
    with model.new_cache(1, PROMPT + STEPS) as cache:
        started = time.perf_counter()
        token = int(model.prefill(cache, [_prompt(model)])[0].argmax())
        first = time.perf_counter() - started
        steps = []
        for _ in range(STEPS):
            began = time.perf_counter()
            token = int(model.decode(cache, [token])[0].argmax())
            steps.append(time.perf_counter() - began)
    return first, statistics.median(steps)


def memory() -> dict[str, int]:
    """Bytes of this process, from /proc/self/smaps_rollup.

    `rss` counts the mapped weights; `pss` too, divided among the processes that map them;
    `private` is what no file backs (RssAnon) and every process would need once more.
    """
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    names = {"rss": "Rss", "pss": "Pss", "private": "Anonymous"}
    return {name: 1024 * kib[key] for name, key in names.items()}


def main() -> None:
    """`python -m tests.scale.probe BUNDLE --output JSON`."""
    parser = argparse.ArgumentParser(prog="python -m tests.scale.probe", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.write_text(json.dumps(probe(arguments.bundle)), encoding="utf-8")


if __name__ == "__main__":
    main()
