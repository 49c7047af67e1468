"""The argument parser of `neo-export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.command.command_line import OneLineParser, add_version

from neo_export.checkpoint.model_options import add_base, add_tokenizer
from neo_export.command.search_options import add_search_options

if TYPE_CHECKING:
    import argparse

__all__ = ["export_parser"]

_EPILOG = """\
MODEL is a Hugging Face folder (safetensors, or pytorch_model.bin with the extra torch; one file or
shards), a hub id such as EleutherAI/gpt-neo-1.3B (extra hub), or
modelscope:AI-ModelScope/gpt-neo-1B3 (extra modelscope). Without MODEL, the demo model included in
the package is exported.

Progress goes to stderr, the summary to stdout. Exit status: 0 written; 1 nothing written, because a
check of the result failed; 2 bad input; 130 interrupted.
"""


def export_parser() -> OneLineParser:
    """Build the parser of `neo-export`."""
    parser = OneLineParser(
        prog="neo-export",
        description="Turn a GPT-Neo checkpoint into a bundle of ONNX graphs over one weight file.",
        epilog=_EPILOG,
    )
    add_version(parser)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="the checkpoint (see below)")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="BUNDLE", help="folder to create"
    )
    add_base(parser)
    add_tokenizer(parser)
    precision = parser.add_argument_group("precision (one of these)")
    _add_precision(precision.add_mutually_exclusive_group())
    _add_target(parser.add_argument_group("target"))
    _add_quantization(parser.add_argument_group("quantization"))
    _add_calibration(parser.add_argument_group("calibration"))
    add_search_options(parser.add_argument_group("search for a plan (--auto)"))
    _add_output(parser.add_argument_group("checks and output"))
    return parser


def _add_precision(group: argparse._MutuallyExclusiveGroup) -> None:
    for name, text in (
        ("fp32", "weights and arithmetic in float32 (the default)"),
        ("fp16", "weights, activations and cache in float16 (default target: cuda)"),
        ("bf16", "the same in bfloat16; targets cuda and tensorrt"),
        (
            "int8",
            "8-bit weights, one scale per output channel; on target cpu 7 of the 8 bits are used, "
            "and activations are 8-bit, one scale per token",
        ),
        (
            "int4",
            "4-bit weights, one scale per block; on target cpu activations are 8-bit, one scale "
            "per block",
        ),
        ("fp8", "weights (with --calibration also activations) in float8 E4M3; target tensorrt"),
    ):
        group.add_argument(
            f"--{name}", dest="precision", action="store_const", const=name, help=text
        )
    group.add_argument(
        "--auto",
        action="store_true",
        help="choose the precision of each matrix by its measured error on --calibrate-text, "
        "within --max-kl or --max-size; minutes for small models, hours for billions of parameters",
    )
    group.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="read the precision of each matrix from a JSON file (docs/quantization.md): fp32, "
        "int8, or int4 with its block size",
    )


def _add_target(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--target",
        choices=("cpu", "cuda", "portable", "tensorrt"),
        help="cpu: onnxruntime's fused operators, cache updated in place, right padding only; "
        "cuda: the same for NVIDIA GPUs, in half precision; portable: standard ONNX operators, "
        "any attention mask; tensorrt: opset 24 with a cache of static length, for neo-engine "
        "(default: cuda for --fp16 and --bf16, tensorrt for --fp8, else cpu)",
    )
    group.add_argument(
        "--tensorrt",
        action="store_true",
        help="--target tensorrt, then build a plan of the bundle with neo-engine's defaults",
    )
    group.add_argument(
        "--compute-capability",
        metavar="X.Y",
        help="--tensorrt: build the plan for GPUs of this compute capability, such as 8.9 "
        "(default: this machine's GPU)",
    )
    group.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="most positions per sequence (default: all of the checkpoint's)",
    )
    group.add_argument(
        "--kv-cache",
        default="float",
        choices=("float", "int8"),
        help="int8: 8-bit keys and values, one scale per channel from --calibration; the cache is "
        "a quarter as large, decoding long contexts is faster, prompts are slower; needs target "
        "cpu, float32 activations and a head size that is a multiple of 16, or of 8 if no layer "
        "uses a window (default: float)",
    )


def _add_quantization(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        help="int4: inputs that share one scale: 16, 32, 64, 128 or 256 (256 not for target "
        "cuda); smaller blocks are more accurate and larger (default: the largest up to 128 that "
        "divides every width)",
    )
    group.add_argument(
        "--keep-fp32",
        action="append",
        default=[],
        metavar="PATTERN",
        help="int8, int4, fp8, plan, auto: do not quantize weights whose names in the checkpoint "
        "match this shell pattern, such as '*.mlp.c_proj.weight'; they stay float32, or float16 "
        "on targets cuda and tensorrt; may be repeated",
    )
    group.add_argument(
        "--int8-prefill",
        action="store_true",
        help="int4, plan: add an int8 copy of the weights for prompts and scoring; prompts run "
        "faster, and the bundle is about three times as large",
    )


def _add_calibration(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="STATS",
        help="statistics that neo-calibrate wrote for this model: int8 and int4 move activation "
        "outliers into the weights and round by GPTQ, fp16 keeps in float32 what would overflow, "
        "and an int8 cache gets its scales",
    )
    group.add_argument(
        "--calibrate-text",
        type=Path,
        metavar="FILE",
        help="first run neo-calibrate on this file (text or JSON lines) and use its statistics; "
        "needs the extra torch",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--verify",
        action="store_true",
        help="compare every layer with PyTorch before writing; needs the extra torch",
    )
    group.add_argument(
        "--force",
        action="store_true",
        help="replace an existing bundle and its plans; refused if other files are in its folder",
    )
    group.add_argument("--json", action="store_true", help="print the summary as JSON")
    group.add_argument(
        "--verbose", action="store_true", help="also print what each pass did to each graph"
    )
