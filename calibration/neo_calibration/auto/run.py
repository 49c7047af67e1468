"""The order of a search: sensitivities, frontier, the plan that holds, the curve."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from neo_export.checkpoint import expected_shapes, open_checkpoint
from neo_export.hub import resolve_model
from neo_export.quantize.int4 import BLOCK_SIZES, largest_block_size
from neo_export.quantize.plan import Storage, WeightPlan
from neo_export.statistics import Statistics
from neo_runtime.errors import RequestError

from neo_calibration.auto.choose import Chooser
from neo_calibration.auto.judge import Judge
from neo_calibration.auto.report import Point, point_of, write_report
from neo_calibration.auto.search import Frontier, frontier_of
from neo_calibration.auto.sensitivity import groups_of, measure_sensitivities, reference_logits
from neo_calibration.auto.stored_form import StoredForm
from neo_calibration.text import read_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from neo_export.checkpoint import Checkpoint
    from neo_runtime.manifest import ModelSpec
    from numpy.typing import NDArray

__all__ = ["AutoOptions", "run_auto"]

_CURVE = 8
"""Plans of the frontier that the curve shows besides the chosen one."""


@dataclass(frozen=True, kw_only=True)
class AutoOptions:
    """What to search for."""

    text: tuple[Path, ...]
    statistics: Path
    output: Path
    """The plan file to write."""
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
    if options.max_divergence is not None and not options.max_divergence > 0:
        raise RequestError(f"--max-kl is {options.max_divergence:g}, expected more than 0")
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(resolve_model(model)))
        statistics = Statistics.open(options.statistics)
        statistics.require_second_moments()
        statistics.check_model(
            checkpoint, lambda done, all_: progress("checking the statistics", done, all_)
        )
        folder = options.remembered or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="neo-auto-"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        limit = _bytes(options.max_size, checkpoint.spec)
        search, judged = _contexts(options, checkpoint, statistics)
        spec = checkpoint.spec
        stored = StoredForm(lambda name: checkpoint.tensors[name].read(), spec, statistics, folder)
        divergences = measure_sensitivities(
            checkpoint,
            search,
            stored,
            _candidates(spec),
            lambda done, all_: progress("measuring what each matrix costs", done, all_),
        )
        frontier = frontier_of(groups_of(spec), expected_shapes(spec), divergences)
        progress("running float32", 0, 0)
        reference = reference_logits(checkpoint, judged)
        judge = Judge(model, judged, reference, options.statistics, folder)
        chooser = Chooser(frontier, _counted(judge.plan, progress))
        if limit is None:
            assert options.max_divergence is not None
            chosen = chooser.within_divergence(options.max_divergence)
        else:
            chosen = chooser.within_size(limit)
        summary = {
            "plan": str(options.output),
            "weight_bytes": chosen.measured.size,
            "divergence": chosen.measured.divergence,
            "interval": chosen.measured.interval,
            "estimate": chosen.plan.divergence,
            "measured_on": judged.size,
            "searched_on": search.size,
        }
        if options.report is not None:
            points = list(_curve(frontier, chooser, judge, spec, progress))
            write_report(
                options.report, model=model, facts=summary, divergences=divergences, points=points
            )
        options.output.write_text(chosen.plan.plan.to_json(), encoding="utf-8")
    return summary


def _bytes(size: str | None, spec: ModelSpec) -> int | None:
    """--max-size in bytes."""
    if size is None:
        return None
    try:
        number = float(size)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise RequestError(f"--max-size is {size!r}, expected bytes, or a fraction below 1")
    if number >= 1:
        return int(number)
    return int(number * sum(4 * int(np.prod(shape)) for shape in expected_shapes(spec).values()))


def _candidates(spec: ModelSpec) -> tuple[Storage, ...]:
    """int8, and int4 in the largest block that fits and smaller ones down to 16."""
    widths = (spec.hidden_size, spec.intermediate_size)
    largest = largest_block_size(widths)
    blocks = sorted({size for size in BLOCK_SIZES if size in (16, 32)} | {largest})
    return (*(Storage("int4", size) for size in blocks if size <= largest), Storage("int8"))


def _contexts(
    options: AutoOptions, checkpoint: Checkpoint, statistics: Statistics
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids [n, S] to search on and [n, S] to measure bundles on, behind the statistics' text.

    Raises:
        RequestError: the text is too short for two parts.
    """
    length = min(checkpoint.spec.max_position_embeddings, max(1, options.tokens))
    each = max(1, options.tokens // length)
    text = read_text(options.text, checkpoint, statistics.tokens + 2 * each * length, length)
    whole = [context for context in text.contexts if len(context) == length]
    if len(whole) < 2 * each:
        raise RequestError(
            f"the text has {text.tokens} tokens: too few for two parts of {each * length}; give "
            "more text, or a smaller --tokens"
        )
    return np.stack(whole[-2 * each : -each]), np.stack(whole[-each:])


def _counted(
    measure: Callable[[WeightPlan], Any], progress: Callable[[str, int, int], None]
) -> Callable[[WeightPlan], Any]:
    count = 0

    def measured(plan: WeightPlan) -> Any:
        nonlocal count
        count += 1
        progress(f"measuring bundle {count}", 0, 0)
        return measure(plan)

    return measured


def _curve(
    frontier: Frontier,
    chooser: Chooser,
    judge: Judge,
    spec: ModelSpec,
    progress: Callable[[str, int, int], None],
) -> Iterator[Point]:
    """Bundles with all matrices alike, and plans along the frontier."""
    blocks = sorted({32, largest_block_size((spec.hidden_size, spec.intermediate_size))})
    kinds = [("int8", None), *(("int4", block) for block in blocks)]
    for precision, block in kinds:
        for kind, calibrated in (("rounded", False), ("calibrated", True)):
            name = str(Storage(precision, block))
            progress(f"measuring {name}, {kind}", 0, 0)
            yield point_of(name, kind, judge.uniform(precision, block, calibrated=calibrated))
    first = next(i for i, plan in enumerate(frontier.plans) if plan.divergence > 0)
    low, high = frontier.plans[first].divergence, frontier.plans[-1].divergence
    for budget in np.geomspace(max(low, high / 300), high, _CURVE):
        chooser.at(max(i for i, p in enumerate(frontier.plans) if p.divergence <= budget * 1.0001))
    for index in sorted(chooser.measured):
        if index:  # 0 is float32
            yield point_of(f"plan {index}", "auto", chooser.measured[index])
