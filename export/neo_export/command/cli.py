"""`neo-export`: converts a checkpoint to a bundle."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.command.command_line import run_command
from neo_runtime.errors import EngineError, RequestError

from neo_export.checkpoint.model_options import model_arguments
from neo_export.command.export_parser import export_parser
from neo_export.command.search_options import search_arguments
from neo_export.reports.stages import StageLine

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from neo_export.command.run_calibration import Searched
    from neo_export.engine.build import BuiltEngine
    from neo_export.exporter import ExportOptions, ExportSummary
    from neo_export.targets import Quantization

__all__ = ["main"]

_CHECK_FAILED = 1
DEMO = Path(__file__).parents[1] / "demo" / "neo-mini"

_LAYOUTS = {
    "in_place": "updated in place",
    "append": "appended to",
    "static": "of static length, updated in place",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = export_parser().parse_args(argv)
    return run_command(
        "neo-export",
        lambda: _run(arguments),
        extras="cpu,export",
        interrupted="interrupted, nothing was written",
        unverified=_CHECK_FAILED,
    )


def _run(arguments: argparse.Namespace) -> int:
    summary, found, built = _export(arguments)
    if arguments.json:
        record = {"engine": asdict(built.record)} if built is not None else {}
        record |= {"auto": found.summary} if found is not None else {}
        print(json.dumps(asdict(summary) | record, indent=1))
    else:
        print(_report(summary, verbose=arguments.verbose))
        if found is not None:
            print(found.report())
        if built is not None:
            from neo_export.engine.cli import report

            print(report(built))
    return 0


def _export(
    arguments: argparse.Namespace,
) -> tuple[ExportSummary, Searched | None, BuiltEngine | None]:
    # Slow imports are deferred, so that --help and usage errors respond at once.
    from neo_export.bundle.staging import check_destination
    from neo_export.command.run_calibration import calibration_folder, check_search, searched
    from neo_export.exporter import ExportOptions, export_bundle
    from neo_export.files.termination import termination_raises

    model = str(DEMO) if arguments.model is None else arguments.model
    precision, quantization = _quantization(arguments)
    search = search_arguments(arguments)
    text, statistics = arguments.calibrate_text, arguments.calibration
    if search is None and statistics and text:
        raise RequestError("--calibration and --calibrate-text were both given; choose one")
    build = _engine_builder(arguments)
    options = ExportOptions(
        base=arguments.base,
        tokenizer=arguments.tokenizer,
        target=_target(arguments, precision),
        precision=precision,
        quantization=quantization,
        kv_cache=arguments.kv_cache,
        max_length=arguments.max_length,
        verify=arguments.verify,
        force=arguments.force,
    )
    if text is not None:
        # Fail before the calibration, which may take hours.
        check_destination(arguments.output, force=arguments.force)
        _check_model(model, options, searches=search is not None)
    named = model_arguments(options.base, options.tokenizer)
    found = None
    with StageLine("neo-export") as bar:
        with termination_raises(), ExitStack() as stack:
            if text is not None and statistics is None:
                if search is not None:
                    check_search(model, text, (*named, *search))
                statistics = stack.enter_context(calibration_folder(model, text, named))
            if search is not None:
                bar.end()
                asked = (*named, *search)
                found = stack.enter_context(searched(model, text, statistics, asked))
                quantization = replace(quantization, plan=found.plan)
                options = replace(options, quantization=quantization, remembered=found.remembered)
            options = replace(options, calibration=statistics)
            summary = export_bundle(model, arguments.output, options, bar.show)
        return summary, found, build(bar.show)


def _check_model(model: str, options: ExportOptions, *, searches: bool) -> None:
    """Run the export's checks now instead of after the calibration."""
    from neo_export.checkpoint.folder import open_model
    from neo_export.decisions.options_check import check_export
    from neo_export.targets import target_named

    with open_model(model, options.base, options.tokenizer) as checkpoint:
        check_export(checkpoint, target_named(options.target), options, searches=searches)


def _target(arguments: argparse.Namespace, precision: str) -> str:
    """The target. Half precision defaults to GPUs: CPUs compute most of it in float32."""
    if arguments.tensorrt:
        return "tensorrt"
    usual = {"fp16": "cuda", "bf16": "cuda", "fp8": "tensorrt"}
    return str(arguments.target or usual.get(precision, "cpu"))


def _engine_builder(
    arguments: argparse.Namespace,
) -> Callable[[Callable[[str, int, int], None]], BuiltEngine | None]:
    """The function that builds a plan after the export; checks its requirements now."""
    if not arguments.tensorrt:
        if arguments.compute_capability is not None:
            raise RequestError("--compute-capability can only be used with --tensorrt")
        return lambda progress: None
    if arguments.target not in (None, "tensorrt"):
        raise RequestError(f"--tensorrt was given with --target {arguments.target}; choose one")
    from neo_export.engine.build import build_engine
    from neo_export.engine.device import device_for
    from neo_export.engine.flavour import find_flavour
    from neo_export.engine.ranges import EngineRequest

    flavour = find_flavour()
    device = device_for(flavour, arguments.compute_capability)

    def build(progress: Callable[[str, int, int], None]) -> BuiltEngine:
        written = f"the bundle {arguments.output} was written, its plan was not"
        try:
            return build_engine(arguments.output, EngineRequest(), flavour, device, progress)
        except EngineError as error:
            raise EngineError(f"{written}: {error}") from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted, {written}; build it with neo-engine") from None

    return build


def _quantization(arguments: argparse.Namespace) -> tuple[str, Quantization]:
    """The precision and its quantization options.

    Raises:
        RequestError: an option does not apply to the precision.
    """
    from neo_export.quantize.plan import WeightPlan
    from neo_export.targets import Quantization

    plan = None if arguments.plan is None else WeightPlan.read(arguments.plan)
    mixed = "--plan" if plan is not None else "--auto" if arguments.auto else None
    precision = arguments.precision or ("fp32" if mixed is None else "mixed")
    asked = mixed or f"--{precision}"
    for given, flag, needs in (
        (arguments.block_size is not None, "--block-size", ("--int4",)),
        (arguments.int8_prefill, "--int8-prefill", ("--int4", "--plan")),
        (
            bool(arguments.keep_fp32),
            "--keep-fp32",
            ("--int8", "--int4", "--fp8", "--plan", "--auto"),
        ),
    ):
        if given and asked not in needs:
            wanted = " or ".join(needs)
            raise RequestError(f"{flag} cannot be combined with {asked}; use it with {wanted}")
    calibrated = arguments.calibration is not None or arguments.calibrate_text is not None
    if calibrated and precision in ("fp32", "bf16") and arguments.kv_cache == "float":
        flag = "--calibration" if arguments.calibration is not None else "--calibrate-text"
        raise RequestError(
            f"{flag} cannot be combined with {asked}, which needs no statistics; use it with "
            "--fp16, --int8, --int4, --plan or --kv-cache int8"
        )
    return precision, Quantization(
        block_size=arguments.block_size,
        keep=tuple(arguments.keep_fp32),
        int8_prefill=arguments.int8_prefill,
        plan=plan,
    )


def _report(summary: ExportSummary, *, verbose: bool) -> str:
    matrices = ", ".join(f"{count} in {kind}" for kind, count in summary.decode_weights.items())
    lines = [
        f"bundle      {summary.bundle}",
        f"digest      {summary.digest}",
        f"target      {summary.target}, {summary.precision}, up to {summary.max_length} positions, "
        f"cache {_LAYOUTS[summary.cache_layout]}, in {summary.cache_dtype}",
        f"parameters  {summary.parameters / 1e6:,.1f} million",
        f"weights     {summary.weight_bytes / 1e6:,.1f} MB in one file; "
        f"{summary.total_bytes / 1e6:,.1f} MB in all; matrices: {matrices}",
        f"time        {summary.seconds:.1f} s; peak memory {summary.peak_rss_bytes / 1e6:,.0f} MB, "
        f"{summary.peak_private_bytes / 1e6:,.0f} MB of it private",
    ]
    for graph in summary.graphs if verbose else ():
        steps = [f"{graph.nodes_before} operators"]
        steps += [f"{step.name} ×{step.fired} → {step.nodes}" for step in graph.passes]
        lines.append(f"{graph.name:<11} {graph.bytes / 1e3:,.0f} kB: {', '.join(steps)}")
    if summary.moved_places:
        gains = [place.error_before / place.error_after for place in summary.moved_places]
        lines.append(
            f"outliers    moved into the weights at {len(gains)} places; the error of their "
            f"products is {min(gains):.3g} to {max(gains):.3g} times smaller"
        )
    lines += [f"float32     {tensor.name} {tensor.reason}" for tensor in summary.kept_wide]
    if summary.largest_score:
        lines.append(
            f"float32     attention scores reach ±{summary.largest_score:.4g}: attention uses "
            "standard operators"
        )
    if not summary.has_tokenizer:
        lines.append(
            "tokenizer   none: prompts are token ids; neo-serve and neo-diff refuse the bundle "
            "(--tokenizer adds one)"
        )
    check = summary.verification
    if check is not None:
        worst = check.worst_place
        where = worst.place if worst.layer is None else f"layer {worst.layer} {worst.place}"
        lines.append(
            f"verified    {check.tokens} positions against PyTorch (window {check.window_size}), "
            "every step on its own inputs; accumulated relative L2, median (worst) of positions: "
            f"logits {check.logits.typical:.2g} ({check.logits.worst:.2g}), {where} "
            f"{worst.typical:.2g} ({worst.worst:.2g})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
