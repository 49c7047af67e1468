"""All decisions of an export before it writes: how everything is stored, and the passes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from neo_runtime.bundle.manifest import Source, is_quantized

from neo_export.checkpoint.fingerprint import checkpoint_fingerprint, fingerprint
from neo_export.decisions.calibrated import calibrated, open_statistics, uses_gptq
from neo_export.gpt_neo.parameters import expected_shapes
from neo_export.quantize.kv_cache import calibrated_steps
from neo_export.quantize.plan import is_planned
from neo_export.quantize.read_back import ReadBack
from neo_export.quantize.remembered import Remembered
from neo_export.quantize.stored import StoredWeights
from neo_export.targets import PassContext

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from neo_runtime.bundle.manifest import CacheSpec, ModelSpec
    from numpy.typing import NDArray

    from neo_export.checkpoint.whole import Checkpoint
    from neo_export.decisions.calibrated import Calibrated
    from neo_export.decisions.options import ExportOptions
    from neo_export.gpt_neo.parameters import ReadParameter
    from neo_export.passes import Pass
    from neo_export.quantize.kv_cache import CacheSteps
    from neo_export.quantize.plan import WeightPlan
    from neo_export.statistics.folder import Statistics
    from neo_export.targets import Target

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The decisions of one export."""

    options: ExportOptions
    target: Target
    spec: ModelSpec
    max_length: int
    """Largest number of positions in a sequence."""
    decided: Calibrated
    cache: CacheSpec
    steps: CacheSteps | None
    """The quantization steps of an int8 cache."""
    read: ReadParameter
    """Returns a weight of the checkpoint, with outlier migration applied."""
    fingerprint: str
    """The checkpoint's fingerprint."""
    calibration_text: str | None
    """sha256 of the text of the statistics."""

    def passes(self, graph: str) -> list[Pass]:
        """Every pass that one graph of the bundle goes through, in order."""
        options, quantizer = self.options, self.decided.quantizer
        if quantizer is not None and options.remembered is not None:
            quantizer = Remembered(quantizer, options.remembered)
        context = PassContext(
            graph=graph,
            precision=options.precision,
            spec=self.spec,
            plan=self._plan(graph),
            cache=self.cache,
            max_length=self.max_length,
            quantizer=quantizer,
            wide=self.decided.half.wide,
            migration=self.decided.migration,
            largest_input=self.decided.largest_input,
            cache_steps=self.steps,
        )
        return self.target.passes(context)

    def stored_weights(self, graph: str, written: Path) -> ReadParameter:
        """A function that returns each weight as a written graph stores it, by checkpoint name.

        Args:
            graph: the graph's name in the bundle.
            written: its file.
        """
        stored = StoredWeights(
            self.read,
            self._plan(graph),
            ReadBack(written) if self.decided.quantizer else self.target.quantizer,
            half_positions=is_quantized(self.options.precision),
        )
        return self.decided.migration.restoring(stored)

    @cached_property
    def source(self) -> Source:
        """The bundle's origin, for its manifest."""

        def counted(graph: str) -> dict[str, int]:
            plan, shapes = self._plan(graph), expected_shapes(self.spec)
            names = [name for name, shape in shapes.items() if is_planned(name, shape)]
            return dict(sorted(Counter(str(plan.of(name)) for name in names).items()))

        return Source(
            checkpoint=self.fingerprint,
            calibration_text=self.calibration_text,
            decode_weights=counted("decode"),
            prefill_weights=counted("prefill"),
        )

    def _plan(self, graph: str) -> WeightPlan:
        options = self.options
        return self.target.plan_for(options.quantization, graph, options.precision, self.spec)


def prepare(
    checkpoint: Checkpoint,
    target: Target,
    options: ExportOptions,
    say: Callable[[str, int, int], None],
) -> Prepared:
    """Make all decisions; this reads the statistics and searches for outlier migrations.

    Args:
        checkpoint: an open checkpoint.
        target: the target that the options name.
        options: the options, which have passed `check_export`.
        say: called with a stage's name, done and total.

    Raises:
        NeoError: the options do not fit the checkpoint or the target, or the statistics do not.
    """
    spec, precision = checkpoint.spec, options.precision
    max_length = options.max_length or spec.max_position_embeddings

    def read(name: str) -> NDArray[np.float32]:
        tensor = checkpoint.tensors[name]
        tensor.check_finite()  # here the error can use the tensor's name in the checkpoint
        return tensor.read()

    plan = target.plan_for(options.quantization, "decode", precision, spec)
    statistics = None
    if options.calibration is not None:
        gptq = uses_gptq(target, plan, spec)
        statistics = open_statistics(options.calibration, checkpoint, say, second_moments=gptq)
    decided = calibrated(
        statistics, checkpoint, read, target, precision, plan, say, options.remembered
    )
    cache = target.cache(spec, precision, max_length, large_scores=decided.half.scores > 0)
    steps = None
    if options.kv_cache == "int8":
        steps = calibrated_steps(statistics, spec)
        cache = replace(cache, dtype="int8")
    return Prepared(
        options=options,
        target=target,
        spec=spec,
        max_length=max_length,
        decided=decided,
        cache=cache,
        steps=steps,
        read=decided.migration.reading(read),
        fingerprint=_fingerprint(checkpoint, statistics, say),
        calibration_text=None if statistics is None else statistics.header.text["digest"],
    )


def _fingerprint(
    checkpoint: Checkpoint, statistics: Statistics | None, say: Callable[[str, int, int], None]
) -> str:
    """The checkpoint's fingerprint; with statistics it is known from checking that they match."""
    if statistics is not None:
        recorded = statistics.header.model["tensors"]
        return fingerprint({name: recorded[name] for name in checkpoint.tensors})

    def progress(done: int, total: int) -> None:
        say("checksum of the checkpoint", done, total)

    return checkpoint_fingerprint(checkpoint, progress)
