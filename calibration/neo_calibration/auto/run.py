"""Runs all steps of a search: sensitivities, frontier, choice of the plan, curve."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_export.checkpoint.folder import open_model
from neo_export.decisions.calibrated import open_statistics
from neo_export.files.text_file import write_text_file
from neo_export.gpt_neo.parameters import expected_shapes

from neo_calibration.auto.choose import Chooser
from neo_calibration.auto.curve import curve_points
from neo_calibration.auto.inputs import SearchInputs, candidate_storages
from neo_calibration.auto.judge import Judge
from neo_calibration.auto.report import write_report
from neo_calibration.auto.search import frontier_of
from neo_calibration.auto.sensitivity import groups_of, measure_sensitivities, reference_logits
from neo_calibration.auto.stored_form import StoredForm

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from neo_export.checkpoint.whole import Checkpoint
    from neo_export.quantize.plan import Storage
    from neo_export.statistics.folder import Statistics
    from numpy.typing import NDArray

    from neo_calibration.auto.choose import Chosen
    from neo_calibration.auto.inputs import TextParts
    from neo_calibration.auto.judge import Measured
    from neo_calibration.auto.search import FrontierPlan
    from neo_calibration.auto.sensitivity import Group

__all__ = ["AutoOptions", "run_auto"]


@dataclass(frozen=True, kw_only=True)
class AutoOptions(SearchInputs):
    """The options of a search: its inputs and outputs."""

    statistics: Path
    output: Path
    """The plan file to write."""
    kv_cache: str = "float"
    """How the measured bundles store keys and values."""
    remembered: Path | None = None


def run_auto(
    model: str, options: AutoOptions, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Search, and write the plan.

    Returns:
        The chosen plan and the measurements, ready for JSON.

    Raises:
        NeoError: bad input, or no plan keeps the limit.
    """
    options.check()
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_model(model, options.base, options.tokenizer))
        limit = options.limit(checkpoint.spec)
        statistics = open_statistics(options.statistics, checkpoint, progress, second_moments=True)
        folder = options.remembered or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="neo-auto-"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        parts = options.parts(checkpoint, statistics.tokens)
        if parts.found < parts.wanted:
            progress(_seen_before(parts), 0, 0)
        found = _sensitivities(checkpoint, parts.search, options, statistics, folder, progress)
        shapes = expected_shapes(checkpoint.spec)
        frontier = frontier_of(groups_of(checkpoint.spec, options.keep), shapes, found)
        progress("running float32", 0, 0)
        reference = reference_logits(checkpoint, parts.judge)
        judge = Judge(
            model,
            parts.judge,
            reference,
            options.statistics,
            folder,
            base=options.base,
            kv_cache=options.kv_cache,
        )
        chooser = Chooser(frontier, _reported(judge, progress))
        chosen = _chosen(chooser, options, limit)
        summary = {
            "limit": {"max_kl": options.max_divergence, "max_size": limit},
            "weight_bytes": chosen.measured.size,
            "divergence": chosen.measured.divergence,
            "interval": chosen.measured.interval,
            "estimate": chosen.plan.divergence,
            "bundles": len(chooser.measured),
            "measured_on": parts.judge.size,
            "searched_on": parts.search.size,
        }
        if options.report is not None:
            points = curve_points(frontier, chooser, chosen, judge, progress)
            write_report(
                options.report,
                model=model,
                plan=chosen.plan.plan,
                facts=summary,
                divergences=found,
                points=points,
            )
        write_text_file(options.output, chosen.plan.plan.to_json())
    return summary


def _chosen(chooser: Chooser, options: AutoOptions, size: int | None) -> Chosen:
    """The plan that keeps the limit: `size` bytes, or if None the options' divergence."""
    if size is not None:
        return chooser.within_size(size)
    assert options.max_divergence is not None
    return chooser.within_divergence(options.max_divergence)


def _seen_before(parts: TextParts) -> str:
    return (
        f"note: the text has {parts.found} tokens, expected {parts.wanted}; the statistics may "
        "include text that bundles are measured on, and divergences may look too small"
    )


def _sensitivities(
    checkpoint: Checkpoint,
    contexts: NDArray[np.int64],
    options: AutoOptions,
    statistics: Statistics,
    folder: Path,
    progress: Callable[[str, int, int], None],
) -> dict[tuple[Group, Storage], float]:
    """KL divergence of each group in each storage, nats."""
    spec = checkpoint.spec
    return measure_sensitivities(
        checkpoint,
        contexts,
        StoredForm(lambda name: checkpoint.tensors[name].read(), spec, statistics, folder),
        candidate_storages(spec),
        groups_of(spec, options.keep),
        lambda done, all_: progress("measuring sensitivities", done, all_),
    )


def _reported(
    judge: Judge, progress: Callable[[str, int, int], None]
) -> Callable[[FrontierPlan], Measured]:
    """A measuring function that also reports its progress and its results."""
    count = 0

    def measure(plan: FrontierPlan) -> Measured:
        nonlocal count
        count += 1
        progress(f"bundle {count}: estimated at {plan.divergence:.3g} nats", 0, 0)
        found = judge.plan(plan.plan)
        progress(f"bundle {count}: {found.size:,} bytes, {found.divergence:.3g} nats", 0, 0)
        return found

    return measure
