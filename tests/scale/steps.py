"""The steps, in the order in which they run: each asks the session and returns figures."""

from __future__ import annotations

import filecmp
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neo_export.tolerances import TOLERANCES
from neo_runtime.errors import DependencyError, NeoError
from neo_tools.peers.environments import python_of
from neo_tools.peers.exports import export_time

from .figures import PRIVATE_LIMIT, Figure, cost, gigabytes
from .parity_steps import half, parity
from .session import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from .session import Session

__all__ = ["STEPS", "SkippedError", "Step"]

RATIO_LIMIT = 1 / 3
"""Of the seconds of `optimum-cli export onnx`."""


_NUMBER = r"([\d.]+(?:e[-+]?\d+)?|nan|inf)"


class SkippedError(Exception):
    """A step cannot run here; the message says why."""


@dataclass(frozen=True)
class Step:
    """One check, selectable by its name."""

    name: str
    summary: str
    run: Callable[[Session], list[Figure]]


def export(session: Session) -> list[Figure]:
    done = session.bundle("fp32", "--fp32")
    size = sum(file.stat().st_size for file in done.bundle.iterdir())
    return [
        *cost(done.measured, done.command, private_limit=PRIVATE_LIMIT),
        Figure(name="size of the bundle", value=size / 1e9, unit="GB", command=done.command),
    ]


def optimum(session: Session) -> list[Figure]:
    try:
        python_of("optimum")
    except DependencyError as error:
        raise SkippedError(str(error)) from error
    ours = session.bundle("fp32", "--fp32")
    session.read_checkpoint()
    folder = session.scratch("optimum")
    theirs = export_time(session.checkpoint, folder)
    session.drop(folder)
    command = shown(("-m", "neo_tools.peers", "export-time", str(session.checkpoint)))
    seconds = {"neo-export": ours.measured.seconds, "optimum-cli": theirs.seconds}
    both = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    return [
        Figure(name="optimum-cli: wall clock", value=theirs.seconds, unit="s", command=command),
        Figure(
            name="optimum-cli: peak memory, resident",
            value=theirs.peak_rss / 1e9,
            unit="GB",
            command=command,
        ),
        Figure(
            name="optimum-cli: peak memory, private (RssAnon)",
            value=theirs.peak_rss_anon / 1e9,
            unit="GB",
            command=command,
        ),
        Figure(
            name="neo-export's time as a share of it",
            value=ours.measured.seconds / theirs.seconds,
            limit=RATIO_LIMIT if session.is_published_shape else None,
            command=f"{ours.command} # and {command}",
            note=both,
        ),
    ]


def verify(session: Session) -> list[Figure]:
    return _verified(session, "fp32", "--fp32")


_GPU_FORMS = {
    "cuda fp16": ("--fp16",),
    "cuda int8": ("--int8", "--target", "cuda"),
    "cuda int4": ("--int4", "--target", "cuda"),
    "tensorrt fp16": ("--fp16", "--target", "tensorrt"),
    "tensorrt int8": ("--int8", "--target", "tensorrt"),
    "tensorrt int4": ("--int4", "--target", "tensorrt"),
    "tensorrt fp8": ("--fp8", "--target", "tensorrt"),
}
"""What onnxruntime's CPU provider can run of them."""


def verify_gpu_forms(session: Session) -> list[Figure]:
    return [
        figure
        for form, options in _GPU_FORMS.items()
        for figure in _verified(session, form, *options)
    ]


def _verified(session: Session, form: str, *options: str) -> list[Figure]:
    try:
        done = session.bundle(f"{form.replace(' ', '-')}-verified", *options, "--verify")
    except NeoError as error:
        return [_failed_verification(session, form, options, error)]
    pair = rf"{_NUMBER} \({_NUMBER}\)"
    pattern = rf"verified +(\d+) positions.*?: logits {pair}, (.*?) {pair}"
    match = re.search(pattern, done.measured.output)
    if match is None:
        raise ValueError(f"no result of --verify in:\n{done.measured.output}")
    session.drop(done.bundle)
    tokens, logits, worst_logits, place, hidden, worst_hidden = match.groups()
    # Of the forms for GPUs weights alone are quantized: what is left is half precision.
    tolerance = TOLERANCES["fp32" if form == "fp32" else "fp16"]
    return [
        Figure(
            name=f"{form}: logits, median relative L2 of {tokens} positions",
            value=float(logits),
            limit=tolerance.any_checkpoint,
            command=done.command,
            note=f"worst position {worst_logits}",
        ),
        Figure(
            name=f"{form}: worst place of all layers, median relative L2",
            value=float(hidden),
            command=done.command,
            note=f"{place}, worst position {worst_hidden}",
        ),
        *cost(done.measured, done.command),
    ]


def _failed_verification(
    session: Session, form: str, options: Sequence[str], error: NeoError
) -> Figure:
    """What is past its limit, as `neo-export --verify` names it; other errors go on."""
    pattern = rf"neo-export: (.*?) (?:is|are) off by {_NUMBER} \(.*?limit of \w+ is {_NUMBER}[.)]"
    match = re.search(pattern, str(error))
    if match is None:
        raise error
    place, value, limit = match.groups()
    export = ("-m", "neo_export.command.cli", str(session.checkpoint), "-o", "BUNDLE")
    command = (*export, *options, "--verify")
    return Figure(
        name=f"{form}: {place}: relative L2",
        value=float(value),
        limit=float(limit),
        command=shown(command),
        note="neo-export wrote nothing",
    )


def reproducible(session: Session) -> list[Figure]:
    first = session.bundle("fp32", "--fp32")
    second = session.bundle("fp32-again", "--fp32")
    names = sorted({file.name for b in (first, second) for file in b.bundle.iterdir()})
    _, different, missing = filecmp.cmpfiles(first.bundle, second.bundle, names, shallow=False)
    digests = [_digest(done.bundle) for done in (first, second)]
    command = f"diff -r {first.bundle} {second.bundle}"
    checked = ("-m", "neo_runtime.command.verify", str(second.bundle))
    measured = session.python(checked, "read every byte and compare the checksums")
    session.drop(second.bundle)
    return [
        *cost(second.measured, second.command, private_limit=PRIVATE_LIMIT),
        Figure(
            name=f"files that differ between two exports, of {len(names)}",
            value=len(different) + len(missing),
            limit=0,
            relation="=",
            command=command,
            note=", ".join(different + missing),
        ),
        Figure(
            name="digest of the second",
            value=digests[1],
            limit=digests[0],
            relation="=",
            command=command,
        ),
        *cost(measured, shown(checked)),
    ]


def runtime(session: Session) -> list[Figure]:
    bundle = session.bundle("fp32", "--fp32").bundle
    facts, _, command = session.child(("-m", "tests.scale.probe", str(bundle)), "probe the runtime")
    seconds = {
        "import and load": "load_seconds",
        "prompt of 128 tokens to first token, first time (graph loaded)": "first_token_seconds",
        "the same, again": "first_token_seconds_warm",
        "one decode step, median of 16": "decode_seconds_warm",
    }
    memory = facts["memory_with_all_graphs"]
    private = Figure(
        name="all three graphs in use: private memory (RssAnon)",
        value=memory["private"] / 1e9,
        unit="GB",
        # Float32 weights are mapped; a copy of them would be private.
        limit=facts["weight_bytes"] / 1e9,
        command=command,
        note="limit: one copy of the weights",
    )
    return [
        *(
            Figure(name=name, value=facts[key], unit="s", command=command)
            for name, key in seconds.items()
        ),
        gigabytes("loaded, no graph in use: RSS", facts["memory_after_load"]["rss"], command),
        gigabytes("all three graphs in use: RSS", memory["rss"], command),
        gigabytes("all three graphs in use: PSS", memory["pss"], command),
        private,
        gigabytes("of it the cache of 144 positions", facts["cache_bytes"], command),
    ]


def footprint(session: Session) -> list[Figure]:
    output = session.scratch("footprint.json")
    from neo_tools import footprint as tool

    command = ("-m", "neo_tools.footprint", "--output", str(output))
    try:
        session.python(command, "measure the footprint")
    except NeoError:  # it also ends with an error where a limit is passed
        if not output.is_file():
            raise
    found = json.loads(output.read_text(encoding="utf-8"))
    return [
        *(
            Figure(
                name=f"`{measured['statement']}`",
                value=measured["seconds"],
                unit="s",
                limit=tool.IMPORT_LIMIT,
                command=shown(command),
                note="without numpy and onnxruntime; loads " + ", ".join(measured["packages"]),
            )
            for measured in found["imports"]
        ),
        Figure(
            name="of the export machine's packages, loaded",
            value=sum(len(measured["export_machine"]) for measured in found["imports"]),
            limit=0,
            relation="=",
            command=shown(command),
        ),
        Figure(
            name="neo-onnx[cpu] installed",
            value=found["size"]["bytes"] / 1e6,
            unit="MB",
            limit=found["limits"]["installed_bytes"] / 1e6,
            command=shown(command),
            note=found["size"]["method"],
        ),
    ]


def _digest(bundle: Path) -> str:
    from neo_runtime.bundle.manifest import MANIFEST_NAME, Manifest

    return Manifest.from_json((bundle / MANIFEST_NAME).read_text(encoding="utf-8")).digest


STEPS = (
    Step("export", "float32: seconds, peak memory, private memory at most 2 GB", export),
    Step("optimum", "`optimum-cli export onnx` of the same: ours in a third of its time", optimum),
    Step("verify", "`neo-export --verify`: every place of every layer against PyTorch", verify),
    Step("verify-gpu", "the same of the forms for GPUs, run by the CPU", verify_gpu_forms),
    Step("reproducible", "a second export has the same bytes; `neo-verify`'s time", reproducible),
    Step("parity", "float32 logits against PyTorch at every position", parity),
    Step("fp16", "float16 logits against PyTorch float32, 600 tokens", half),
    Step("runtime", "time to load and to the first token, memory of all three graphs", runtime),
    Step("footprint", "import time and installed size of the runtime", footprint),
)
