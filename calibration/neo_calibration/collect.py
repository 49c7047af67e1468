"""Collects every place's statistics by running text through a model, one layer at a time.

All positions go through a layer before the next layer's weights are loaded. Between layers the
hidden states are in a memory-mapped scratch file. After each layer the work folder is consistent:

    .NAME.calibrating/            beside the destination; a killed run resumes from here
        lock                      held while a run works on it
        request.json              what is being collected; another request starts anew
        hidden.{i}                input of layer i, float32 [tokens, hidden]
        new/                      becomes NAME: files of the finished layers
        parts/                    their summaries, JSON
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
from neo_export.checkpoint.fingerprint import fingerprint, tensor_digests
from neo_export.comparison.reference import LayeredReference
from neo_export.statistics.header import (
    INPUT_PLACES,
    MEASURED_PLACES,
    SCHEMA_VERSION,
    STATISTICS_NAME,
    PlaceStatistics,
    StatisticsHeader,
)

from neo_calibration.accumulate import Accumulator
from neo_calibration.arrays import write_whole
from neo_calibration.layer import ObservedLayer
from neo_calibration.likely import POSITIONS, LikelyCollector
from neo_calibration.work_folder import WorkFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from neo_export.checkpoint.whole import Checkpoint
    from numpy.typing import NDArray

    from neo_calibration.text import CalibrationText

__all__ = ["SAMPLES", "collect"]

SAMPLES = 256
"""Number of sampled positions whose values are kept, at the places that a matrix reads."""
_HEAD_ROWS = 256


@dataclass(frozen=True)
class _Run:
    """The state that all steps share."""

    checkpoint: Checkpoint
    text: CalibrationText
    reference: LayeredReference
    work: WorkFolder
    second_moments: bool
    say: Callable[[str, int, int], None]

    def contexts(self, samples: int = SAMPLES) -> Iterator[tuple[slice, NDArray[np.int64]]]:
        """Each context's rows in the scratch files, and the sampled rows within the context."""
        wanted = np.unique(np.linspace(0, self.text.tokens - 1, samples).astype(np.int64))
        start = 0
        for context in self.text.contexts:
            stop = start + len(context)
            yield slice(start, stop), wanted[(wanted >= start) & (wanted < stop)] - start
            start = stop

    def accumulator(self, prefix: str, place: str, channels: int) -> Accumulator:
        inputs = place in INPUT_PLACES
        return Accumulator(
            f"{prefix}.{place}",
            channels,
            inputs=inputs,
            second_moment=inputs and self.second_moments,
        )


def collect(
    checkpoint: Checkpoint,
    text: CalibrationText,
    output: Path,
    *,
    second_moments: bool = True,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> StatisticsHeader:
    """Write the folder of statistics, atomically.

    If killed at any moment, the same call resumes from the last finished layer, and its result has
    the same bytes (on the same machine and versions).

    Args:
        checkpoint: the model.
        text: the text to run.
        output: the folder to write.
        second_moments: whether to keep E[x xᵀ] of the places that matrices read.
        force: replace an existing folder of statistics.
        progress: called with a stage, done and total (positions, summed over layers).

    Raises:
        StatisticsError: a value is NaN or infinite; the message names the place.
        OutputError: `output` exists, or cannot be written.
        DependencyError: torch or transformers is missing.
    """
    say = progress or (lambda stage, done, total: None)
    say("reading the model", 0, 0)  # not part of the positions that are counted later
    digests = tensor_digests(checkpoint)
    reference = LayeredReference(checkpoint)
    request = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint(digests),
        "spec": asdict(checkpoint.spec),
        "text": text.digest,
        "second_moments": second_moments,
        "tools": _tools(),
    }
    with WorkFolder.acquire(output, request, force=force) as work:
        run = _Run(checkpoint, text, reference, work, second_moments, say)
        _embed(run)
        for layer in range(checkpoint.spec.num_layers):
            if not work.has_part(f"transformer.h.{layer}"):
                _layer(run, layer)
        _head(run)
        header = _header(run, digests)
        write_whole(work.new / STATISTICS_NAME, header.to_json())
        work.finish(force=force)
    return header


def _embed(run: _Run) -> None:
    name, hidden = "transformer.embedding", run.checkpoint.spec.hidden_size
    if run.work.has_part(name):
        return
    place = run.accumulator("transformer", "embedding", hidden)
    with run.work.hidden_to_write(0, run.text.tokens, hidden) as rows:
        for (where, sampled), ids in zip(run.contexts(), run.text.contexts, strict=True):
            rows[where] = run.reference.embed(ids)
            place.add(_tensor(rows[where]), sampled)
    run.work.write_part(name, [place.finish(run.work.file_name(name))])


def _layer(run: _Run, layer: int) -> None:
    spec, name = run.checkpoint.spec, f"transformer.h.{layer}"
    widths = dict.fromkeys(MEASURED_PLACES, spec.hidden_size)
    widths |= {"c_fc": spec.intermediate_size, "gelu": spec.intermediate_size}
    places = {place: run.accumulator(name, place, widths[place]) for place in MEASURED_PLACES}
    observed = ObservedLayer(run.reference, spec, layer)
    scores = np.zeros(spec.num_heads, np.float32)
    before = run.work.hidden(layer, run.text.tokens, spec.hidden_size)
    with run.work.hidden_to_write(layer + 1, run.text.tokens, spec.hidden_size) as after:
        for where, sampled in run.contexts():
            seen = observed.run(np.array(before[where]))
            for place, accumulator in places.items():
                accumulator.add(seen[place], sampled)
            scores = np.maximum(scores, observed.score_max(seen["query"], seen["key"]))
            after[where] = seen["residual"].numpy()
            done = layer * run.text.tokens + where.stop
            run.say(f"layer {layer + 1} of {spec.num_layers}", done, _total(run))
    observed.close()
    file = run.work.file_name(name)
    results = [accumulator.finish(file) for accumulator in places.values()]
    run.work.write_part(name, results, scores)
    run.work.forget_hidden(layer)


def _head(run: _Run) -> None:
    """The final norm, and the head's likely tokens."""
    spec, name = run.checkpoint.spec, "transformer.final_norm"
    if run.work.has_part(name):
        return
    import torch

    norm = run.reference.load_final_norm()
    place = run.accumulator("transformer", "final_norm", spec.hidden_size)
    logits = run.accumulator("transformer", "logits", spec.vocab_size)
    hidden = run.work.hidden(spec.num_layers, run.text.tokens, spec.hidden_size)
    none = np.empty(0, np.int64)
    likely = None
    if run.second_moments:
        count = min(POSITIONS, run.text.tokens)
        likely = LikelyCollector(count, spec.hidden_size, spec.vocab_size)
    for (where, sampled), (_, kept) in zip(run.contexts(), run.contexts(POSITIONS), strict=True):
        with torch.inference_mode():
            final = norm(_tensor(np.array(hidden[where])))
        place.add(final, sampled)
        for start in range(0, len(final), _HEAD_ROWS):
            found = run.reference.logits(final[start : start + _HEAD_ROWS].numpy())
            logits.add(_tensor(found), none)
            rows = kept[(kept >= start) & (kept < start + len(found))]
            if likely is not None:
                likely.add(final[rows], _tensor(found[rows - start]))
        run.say("head", _total(run) - run.text.tokens + where.stop, _total(run))
    file = run.work.file_name(name)
    results = [place.finish(file), logits.finish(file)]
    if likely is not None:
        results[1].arrays.update(likely.arrays)
    run.work.write_part(name, results)


def _total(run: _Run) -> int:
    return (run.checkpoint.spec.num_layers + 1) * run.text.tokens


def _tensor(values: NDArray[np.float32]) -> object:
    import torch

    return torch.from_numpy(values)


def _header(run: _Run, digests: dict[str, str]) -> StatisticsHeader:
    layers = [f"transformer.h.{layer}" for layer in range(run.checkpoint.spec.num_layers)]
    places: dict[str, PlaceStatistics] = {}
    scores: dict[str, tuple[float, ...]] = {}
    for name in ("transformer.embedding", *layers, "transformer.final_norm"):
        summaries, heads = run.work.read_part(name)
        places |= summaries
        if heads:
            scores[name] = heads
    return StatisticsHeader(
        schema_version=SCHEMA_VERSION,
        model={"spec": asdict(run.checkpoint.spec), "tensors": digests},
        text={
            "digest": run.text.digest,
            "tokens": run.text.tokens,
            "contexts": len(run.text.contexts),
            "max_length": run.text.max_length,
            "files": run.text.files,
        },
        places=places,
        score_max=scores,
        tools=_tools(),
    )


def _tools() -> dict[str, str]:
    names = ("neo-onnx", "numpy", "tokenizers", "torch", "transformers")
    return {name: version(name) for name in names} | {"python": platform.python_version()}
