"""`neo-export`: a checkpoint in, a bundle out."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.errors import NeoError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_export.exporter import ExportSummary

__all__ = ["main"]

DEMO = Path(__file__).parent / "demo" / "neo-mini"

_EPILOG = """\
MODEL is a Hugging Face folder (safetensors, or pytorch_model.bin, whole or in shards), a hub id
such as EleutherAI/gpt-neo-1.3B, or modelscope:AI-ModelScope/gpt-neo-1B3. Without it the demo model
that comes with the package is exported.

Progress goes to stderr, the summary to stdout. Exit status: 0 written, 1 written nothing because
a check of the result failed, 2 bad input.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neo-export",
        description="Turn a GPT-Neo checkpoint into a bundle of ONNX graphs over one weight file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="the checkpoint (see below)")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="BUNDLE", help="folder to create"
    )
    precision = parser.add_mutually_exclusive_group()
    for name, text in (
        ("fp32", "weights and arithmetic in float32 (the default)"),
        ("fp16", "weights, activations and cache in float16"),
    ):
        precision.add_argument(
            f"--{name}", dest="precision", action="store_const", const=name, help=text
        )
    parser.set_defaults(precision="fp32")
    parser.add_argument(
        "--target",
        default="cpu",
        choices=("cpu", "portable"),
        help="cpu: onnxruntime's fused operators, cache updated in place, right padding only; "
        "portable: standard ONNX operators, any attention mask (default: cpu)",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="positions a sequence may have (default: all that the checkpoint has)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare every layer with PyTorch before writing"
    )
    parser.add_argument("--force", action="store_true", help="replace a bundle that is there")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    bar = _Progress()
    try:
        from neo_export.exporter import ExportOptions, export_bundle

        summary = export_bundle(
            arguments.model or str(DEMO),
            arguments.output,
            ExportOptions(
                target=arguments.target,
                precision=arguments.precision,
                max_length=arguments.max_length,
                verify=arguments.verify,
                force=arguments.force,
            ),
            bar.show,
        )
    except NeoError as error:
        bar.end()
        print(f"neo-export: {error}", file=sys.stderr)
        return 1 if isinstance(error, VerificationError) else 2
    except ImportError as error:
        bar.end()
        print(
            f"neo-export: the package {error.name} is missing; "
            "install neo-onnx with its extra: pip install 'neo-onnx[cpu,export]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        bar.end()
        print("neo-export: interrupted, nothing was written", file=sys.stderr)
        return 130
    bar.end()
    print(json.dumps(asdict(summary), indent=1) if arguments.json else _report(summary))
    return 0


class _Progress:
    """Stages on stderr: one line each, rewritten in place on a terminal."""

    def __init__(self) -> None:
        self._stage = ""
        self._tenths = -1
        self._open = False

    def show(self, stage: str, done: int, total: int) -> None:
        tenths = 10 * done // total if total else -1
        if (stage, tenths) == (self._stage, self._tenths):
            return
        if stage != self._stage:
            self.end()
            self._stage = stage
        self._tenths = tenths
        text = f"neo-export: {stage}" + (f" {10 * tenths} %" if total else "")
        if sys.stderr.isatty():
            print(f"\r{text}", end="", file=sys.stderr, flush=True)
            self._open = True
        elif tenths in (-1, 10):
            print(text, file=sys.stderr)

    def end(self) -> None:
        if self._open:
            print(file=sys.stderr)
            self._open = False


def _report(summary: ExportSummary) -> str:
    lines = [
        f"bundle      {summary.bundle}",
        f"digest      {summary.digest}",
        f"target      {summary.target}, {summary.precision}, up to {summary.max_length} positions, "
        f"cache {'updated in place' if summary.cache_layout == 'in_place' else 'appended to'}",
        f"parameters  {summary.parameters / 1e6:,.1f} million",
        f"weights     {summary.weight_bytes / 1e6:,.1f} MB in one file; "
        f"{summary.total_bytes / 1e6:,.1f} MB in all",
        f"time        {summary.seconds:.1f} s; peak memory {summary.peak_rss_bytes / 1e6:,.0f} MB, "
        f"of it private {summary.peak_private_bytes / 1e6:,.0f} MB",
    ]
    for graph in summary.graphs:
        steps = [f"{graph.nodes_before} operators"]
        steps += [f"{step.name} ×{step.fired} → {step.nodes}" for step in graph.passes]
        lines.append(f"{graph.name:<11} {graph.bytes / 1e3:,.0f} kB: {', '.join(steps)}")
    check = summary.verification
    if check is not None:
        worst = check.worst_place
        where = worst.place if worst.layer is None else f"layer {worst.layer} {worst.place}"
        lines.append(
            f"verified    {check.tokens} positions against PyTorch (window {check.window_size}): "
            f"logits off by {check.logits_error:.2g}, worst place {where} {worst.error:.2g} "
            "(relative L2)"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
