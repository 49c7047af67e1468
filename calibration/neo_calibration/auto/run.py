"""The order of a search: sensitivities, frontier, the plan that holds, the curve."""

from __future__ import annotations

import math
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.checkpoint.hub import resolve_model
from neo_export.command.search_options import check_divergence, check_report_folder, parse_size
from neo_export.files.text_file import write_text_file
from neo_export.gpt_neo.parameters import expected_shapes
from neo_export.quantize.int4 import BLOCK_SIZES, largest_block_size
from neo_export.quantize.plan import Storage, WeightPlan, check_patterns
from neo_export.statistics.folder import Statistics
from neo_runtime.errors import RequestError

from neo_calibration.auto.choose import Chooser
from neo_calibration.auto.curve import curve_points
from neo_calibration.auto.judge import Judge
from neo_calibration.auto.report import write_report
from neo_calibration.auto.search import frontier_of, rest_of
from neo_calibration.auto.sensitivity import groups_of, measure_sensitivities, reference_logits
from neo_calibration.auto.stored_form import StoredForm
from neo_calibration.text import read_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_export.checkpoint.folder import Checkpoint
    from neo_runtime.bundle.manifest import ModelSpec
    from numpy.typing import NDArray

    from neo_calibration.auto.judge import Measured
    from neo_calibration.auto.search import FrontierPlan
    from neo_calibration.auto.sensitivity import Group

__all__ = ["AutoOptions", "run_auto"]


@dataclass(frozen=True, kw_only=True)
class AutoOptions:
    """What to search for."""

    text: tuple[Path, ...]
    statistics: Path
    output: Path
    """The plan file to write."""
    keep: tuple[str, ...] = ()
    """Shell patterns: these matrices stay float32."""
    kv_cache: str = "float"
    """How the bundles that are judged keep keys and values."""
    max_divergence: float | None = None
    """Nats."""
    max_size: str | None = None
    """Bytes of the weight file, or a fraction below 1 of float32's."""
    tokens: int = 4096
    remembered: Path | None = None
    report: Path | None = None


def run_auto(
    model: str, options: AutoOptions, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Search, and write the plan.

    Returns:
        What was chosen and measured, ready for JSON.

    Raises:
        NeoError: bad input, or no plan keeps the limit.
    """
    if options.max_divergence is not None:
        check_divergence(options.max_divergence)
    if options.report is not None:
        check_report_folder(options.report)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(resolve_model(model)))
        check_patterns(options.keep, expected_shapes(checkpoint.spec), "--keep-fp32")
        limit = _size_limit(options, checkpoint.spec)
        statistics = Statistics.open(options.statistics)
        statistics.require_second_moments()
        statistics.check_model(
            checkpoint, lambda done, all_: progress("checking the statistics", done, all_)
        )
        folder = options.remembered or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="neo-auto-"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        search, judged = _contexts(options, checkpoint, statistics, progress)
        found = _sensitivities(checkpoint, search, options, statistics, folder, progress)
        shapes = expected_shapes(checkpoint.spec)
        frontier = frontier_of(groups_of(checkpoint.spec, options.keep), shapes, found)
        progress("running float32", 0, 0)
        reference = reference_logits(checkpoint, judged)
        judge = Judge(
            model, judged, reference, options.statistics, folder, kv_cache=options.kv_cache
        )
        chooser = Chooser(frontier, _reported(judge, progress))
        if limit is None:
            assert options.max_divergence is not None
            chosen = chooser.within_divergence(options.max_divergence)
        else:
            chosen = chooser.within_size(limit)
        summary = {
            "limit": {"max_kl": options.max_divergence, "max_size": limit},
            "weight_bytes": chosen.measured.size,
            "divergence": chosen.measured.divergence,
            "interval": chosen.measured.interval,
            "estimate": chosen.plan.divergence,
            "bundles": len(chooser.measured),
            "measured_on": judged.size,
            "searched_on": search.size,
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


def _sensitivities(
    checkpoint: Checkpoint,
    contexts: NDArray[np.int64],
    options: AutoOptions,
    statistics: Statistics,
    folder: Path,
    progress: Callable[[str, int, int], None],
) -> dict[tuple[Group, Storage], float]:
    """What each group costs in each storage, nats."""
    spec = checkpoint.spec
    return measure_sensitivities(
        checkpoint,
        contexts,
        StoredForm(lambda name: checkpoint.tensors[name].read(), spec, statistics, folder),
        _candidates(spec),
        groups_of(spec, options.keep),
        lambda done, all_: progress("measuring what each matrix costs", done, all_),
    )


def _size_limit(options: AutoOptions, spec: ModelSpec) -> int | None:
    """--max-size in bytes.

    Raises:
        RequestError: it is not a size, or no plan can be that small.
    """
    if options.max_size is None:
        return None
    shapes, number = expected_shapes(spec), parse_size(options.max_size)
    whole = sum(4 * math.prod(shape) for shape in shapes.values())
    limit = int(number if number >= 1 else number * whole)
    plans = (WeightPlan(storage).keeping(options.keep) for storage in _candidates(spec))
    least = min(plan.bytes_of(shapes) for plan in plans) + rest_of(shapes)
    if least > limit:
        raise RequestError(
            f"--max-size {options.max_size}: at most {limit:,} bytes of weights were asked for, "
            f"and the smallest bundle has at least {least:,}"
        )
    return limit


def _candidates(spec: ModelSpec) -> tuple[Storage, ...]:
    """int8, and int4 in the largest block that fits and smaller ones down to 16."""
    widths = (spec.hidden_size, spec.intermediate_size)
    largest = largest_block_size(widths)
    blocks = sorted({size for size in BLOCK_SIZES if size in (16, 32)} | {largest})
    return (*(Storage("int4", size) for size in blocks if size <= largest), Storage("int8"))


def _contexts(
    options: AutoOptions,
    checkpoint: Checkpoint,
    statistics: Statistics,
    progress: Callable[[str, int, int], None],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids [n, S] to search on and [n, S] to measure bundles on, after the statistics' text.

    Raises:
        RequestError: the text is too short for two parts.
    """
    length = min(checkpoint.spec.max_position_embeddings, max(1, options.tokens))
    each = max(1, options.tokens // length)
    wanted = statistics.tokens + 2 * each * length
    text = read_text(options.text, checkpoint, wanted, length)
    whole = [context for context in text.contexts if len(context) == length]
    if len(whole) < 2 * each:
        raise RequestError(
            f"the text has {text.tokens} tokens: too few for two parts of {each * length}; give "
            "more text, or a smaller --tokens"
        )
    if text.tokens < wanted:
        progress(
            f"note: the text has {text.tokens} tokens, {wanted} would do; the statistics may have "
            "seen what is measured on, which then looks better than it is",
            0,
            0,
        )
    return np.stack(whole[-2 * each : -each]), np.stack(whole[-each:])


def _reported(
    judge: Judge, progress: Callable[[str, int, int], None]
) -> Callable[[FrontierPlan], Measured]:
    """Measuring that says what it is at, and what it found."""
    count = 0

    def measure(plan: FrontierPlan) -> Measured:
        nonlocal count
        count += 1
        progress(f"bundle {count}: estimated at {plan.divergence:.3g} nats", 0, 0)
        found = judge.plan(plan.plan)
        progress(f"bundle {count}: {found.size:,} bytes, {found.divergence:.3g} nats", 0, 0)
        return found

    return measure
