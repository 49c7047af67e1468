"""`neo-verify BUNDLE`: compare every byte of a bundle with its checksums."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_runtime.bundle.engine_record import ENGINES_FOLDER, read_records
from neo_runtime.bundle.folder import check_installation, open_bundle
from neo_runtime.bundle.manifest import MANIFEST_NAME
from neo_runtime.bundle.step_kernels import find_kernels, read_kernels
from neo_runtime.command.command_line import OneLineParser, add_version, discard_stdout, run_command
from neo_runtime.errors import BundleDamagedError, BundleError, EngineError, NeoError
from neo_runtime.machine.installation import onnxruntime_is_installed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_runtime.bundle.engine_record import EngineRecord
    from neo_runtime.bundle.folder import Bundle
    from neo_runtime.bundle.step_kernels import StepKernels

__all__ = ["main"]

_WHOLE, _DAMAGED, _UNUSABLE = 0, 1, 2
_STRANGE = "built from ANOTHER bundle, will not run"
_EPILOG = """exit status:
  0    intact, and this installation can run it (not checked without onnxruntime)
  1    damaged
  2    wrong usage, not a bundle, or intact but not for this installation
  130  interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = OneLineParser(
        prog="neo-verify",
        description="Check every file of a bundle, and its TensorRT plans, against their recorded "
        "sizes and sha256.",
        epilog=_EPILOG,
    )
    add_version(parser)
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder written by neo-export")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(argv)
    work = partial(_run, arguments.bundle, as_json=arguments.json)
    return run_command(parser.prog, work, extras="cpu")


def _run(folder: str, *, as_json: bool) -> int:
    progress = _Progress()
    report: dict[str, Any] = {"bundle": folder}
    try:
        bundle = open_bundle(folder, verify=True, progress=progress.update, check_runtime=False)
        report |= _facts(bundle, _whole_plans(bundle), _whole_kernels(bundle))
        if onnxruntime_is_installed():
            report["onnxruntime"] = check_installation(bundle.manifest, bundle.path)
        status, report["status"] = _WHOLE, "whole"
    except (BundleDamagedError, EngineError) as error:
        status, report["status"], report["error"] = _DAMAGED, "damaged", str(error)
    except NeoError as error:
        status, report["status"], report["error"] = _UNUSABLE, "unusable", str(error)
    finally:
        progress.clear()
    if "error" in report:
        print(f"neo-verify: {report['error']}", file=sys.stderr)
    return _print(json.dumps(report, indent=1) if as_json else _text(report), status)


def _whole_plans(bundle: Bundle) -> list[EngineRecord]:
    """Verify the checksums of the TensorRT plans; returns their records.

    Raises:
        EngineError: a record cannot be read, or a plan is missing or does not match its record.
        BundleError: a plan cannot be read.
    """
    records = read_records(bundle.path)
    for record in records:
        path = bundle.path / ENGINES_FOLDER / record.file
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}") from error
        if found != record.sha256:
            raise EngineError(
                f"{path} differs from its record: sha256 {found}, expected {record.sha256}; "
                "build it again with neo-engine"
            )
    return records


def _whole_kernels(bundle: Bundle) -> dict[str, StepKernels]:
    """Verify the checksums of the kernels; returns the kernels by file name.

    Raises:
        EngineError: a file cannot be read, or does not match its checksum.
        BundleUnsupportedError: a file has another schema version.
    """
    found = {path.name: read_kernels(path) for path in find_kernels(bundle.path)}
    for kernels in found.values():
        for kernel in kernels.kernels:
            kernel.binary()
    return found


def _facts(
    bundle: Bundle, plans: list[EngineRecord], kernels: dict[str, StepKernels]
) -> dict[str, Any]:
    manifest, model = bundle.manifest, bundle.manifest.model
    present = {
        Path(parent, name).relative_to(bundle.path).as_posix()
        for parent, _, names in os.walk(bundle.path)
        for name in names
    }
    known = {MANIFEST_NAME, *manifest.files}
    for plan in plans:
        name = f"{ENGINES_FOLDER}/{plan.file}"
        known |= {name, Path(name).with_suffix(".json").as_posix()}
    known |= {f"{ENGINES_FOLDER}/{name}" for name in kernels}
    return {
        "model": f"GPT-Neo, {model.num_layers} layers, width {model.hidden_size}, "
        f"vocabulary {model.vocab_size}",
        "precision": manifest.precision,
        "target": manifest.target,
        "max_length": manifest.max_length,
        "graphs": sorted(manifest.graphs),
        "files": {name: record.size for name, record in sorted(manifest.files.items())},
        "bytes": sum(record.size for record in manifest.files.values()),
        "not_listed": sorted(present - known),
        "plans": {plan.file: _plan_facts(plan, manifest.digest) for plan in plans},
        "kernels": {name: _kernel_facts(one, manifest.digest) for name, one in kernels.items()},
        "digest": manifest.digest,
        "cache": manifest.cache.dtype,
        "source": None if manifest.source is None else asdict(manifest.source),
        "minimum_onnxruntime": manifest.minimum_onnxruntime,
        "onnxruntime": None,
    }


def _plan_facts(plan: EngineRecord, digest: str) -> dict[str, Any]:
    return {
        "size": plan.size,
        "flavour": plan.flavour,
        "version": plan.version,
        "compute_capability": plan.compute_capability,
        "of_this_bundle": plan.bundle_digest == digest,
    }


def _kernel_facts(kernels: StepKernels, digest: str) -> dict[str, Any]:
    return {
        "compute_capability": kernels.compute_capability,
        "compiler": kernels.compiler,
        "of_this_bundle": kernels.bundle_digest == digest,
    }


def _kernels_line(name: str, kernels: dict[str, Any]) -> str:
    """A line of text about one file of kernels."""
    line = (
        f"  kernels {name}: compute capability {kernels['compute_capability']}, "
        f"{kernels['compiler']}"
    )
    return line if kernels["of_this_bundle"] else f"{line}; {_STRANGE}"


def _plan_line(name: str, plan: dict[str, Any]) -> str:
    """A line of text about one plan."""
    line = (
        f"  plan {name}: {plan['size']:,} bytes, {plan['flavour']} {plan['version']}, compute "
        f"capability {plan['compute_capability']}"
    )
    return line if plan["of_this_bundle"] else f"{line}; {_STRANGE}"


def _text(report: dict[str, Any]) -> str:
    """The result as text; empty if there was nothing to verify."""
    if "digest" not in report:
        return ""
    width = max(len(f"{size:,}") for size in report["files"].values())
    lines = [
        f"{report['bundle']}: every file has its recorded size and sha256",
        f"  {report['model']}; {report['precision']}, target {report['target']}, "
        f"up to {report['max_length']} positions, keys and values in {report['cache']}",
        *(f"  {size:>{width},}  {name}" for name, size in report["files"].items()),
        f"  {report['bytes']:>{width},}  bytes in {len(report['files'])} files",
        *(_plan_line(name, plan) for name, plan in report["plans"].items()),
        *(_kernels_line(name, kernels) for name, kernels in report["kernels"].items()),
        *(f"  not listed in {MANIFEST_NAME}, not checked: {n}" for n in report["not_listed"]),
        f"  digest {report['digest']}",
        *_source_lines(report["source"]),
        f"  onnxruntime {report['onnxruntime'] or 'is not installed or cannot be used'}, "
        f"needed {report['minimum_onnxruntime']} or newer",
    ]
    return "\n".join(map(_shown, lines))


def _shown(line: str) -> str:
    """Escape control characters, so that a file name cannot forge lines or move the cursor."""
    return line if line.isprintable() else line.encode("unicode_escape").decode()


def _source_lines(source: dict[str, Any] | None) -> list[str]:
    """Lines of text about what the bundle was made from."""
    if source is None:
        return []

    def counted(weights: dict[str, int]) -> str:
        return ", ".join(f"{count} in {kind}" for kind, count in weights.items())

    lines = [f"  made from a checkpoint of sha256 {source['checkpoint']}"]
    if source["calibration_text"] is not None:
        lines.append(f"  calibrated on a text of sha256 {source['calibration_text']}")
    lines.append(f"  matrices {counted(source['decode_weights'])}")
    if source["prefill_weights"] != source["decode_weights"]:
        lines.append(f"  matrices of prompts {counted(source['prefill_weights'])}")
    return lines


def _print(text: str, status: int) -> int:
    """Print and flush; a closed pipe does not change the exit status."""
    try:
        if text:
            print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()
    return status


class _Progress:
    """A progress line on stderr: redrawn on a terminal, elsewhere printed every ten seconds."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._every = 0.1 if self._tty else 10.0
        self._last = time.monotonic()
        self._drawn = False

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < self._every:
            return
        self._last = now
        line = f"checked {done / 1e9:.1f} of {total / 1e9:.1f} GB"
        print(f"\r{line}" if self._tty else line, end="" if self._tty else "\n", file=sys.stderr)
        sys.stderr.flush()
        self._drawn = True

    def clear(self) -> None:
        """Erase the line from a terminal."""
        if self._tty and self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
