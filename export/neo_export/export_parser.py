"""The options of `neo-export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from neo_runtime.command_line import add_version

from neo_export.search_options import add_search_options

__all__ = ["export_parser"]

_EPILOG = """\
MODEL is a Hugging Face folder (safetensors, or pytorch_model.bin, whole or in shards), a hub id
such as EleutherAI/gpt-neo-1.3B, or modelscope:AI-ModelScope/gpt-neo-1B3. Without it the demo model
that comes with the package is exported.

Progress goes to stderr, the summary to stdout. Exit status: 0 written, 1 written nothing because
a check of the result failed, 2 bad input.
"""


def export_parser() -> argparse.ArgumentParser:
    """What `neo-export --help` shows."""
    parser = argparse.ArgumentParser(
        prog="neo-export",
        description="Turn a GPT-Neo checkpoint into a bundle of ONNX graphs over one weight file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="the checkpoint (see below)")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="BUNDLE", help="folder to create"
    )
    precision = parser.add_mutually_exclusive_group()
    for name, text in (
        ("fp32", "weights and arithmetic in float32 (the default)"),
        ("fp16", "weights, activations and cache in float16 (without --target: for cuda)"),
        ("bf16", "the same in bfloat16; cuda only"),
        ("int8", "weights in 7 of 8 bits, a scale a channel; activations in 8, a scale a token"),
        ("int4", "weights in 4 bits, a scale a block; activations in 8, a scale a block"),
        ("fp8", "target tensorrt: weights (with --calibration also products) in float8 E4M3"),
    ):
        precision.add_argument(
            f"--{name}", dest="precision", action="store_const", const=name, help=text
        )
    precision.add_argument(
        "--auto",
        action="store_true",
        help="find a storage for each matrix by what it costs on text (--calibrate-text), within "
        "--max-kl or --max-size; minutes for small models, hours for billions of parameters",
    )
    precision.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="a storage for each matrix, from a JSON file (docs/quantization.md): fp32, int8, and "
        "int4 with block sizes of its own",
    )
    parser.add_argument(
        "--target",
        choices=("cpu", "cuda", "portable", "tensorrt"),
        help="cpu: onnxruntime's fused operators, cache updated in place, right padding only; "
        "cuda: the same for NVIDIA GPUs, in half precision; portable: standard ONNX operators, "
        "any attention mask; tensorrt: opset 24 with a cache of static length, for neo-engine "
        "(default: cuda for --fp16 and --bf16, tensorrt for --fp8, else cpu)",
    )
    parser.add_argument(
        "--tensorrt",
        action="store_true",
        help="--target tensorrt, and a plan of the bundle with neo-engine's defaults at once",
    )
    parser.add_argument(
        "--compute-capability",
        metavar="X.Y",
        help="--tensorrt: build the plan for GPUs of this compute capability, such as 8.9 "
        "(default: this machine's GPU)",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        help="int4: how many inputs share a scale: 16, 32, 64, 128 or 256; fewer are more exact, "
        "more are smaller (default: the largest up to 128 that divides every width)",
    )
    parser.add_argument(
        "--keep-fp32",
        action="append",
        default=[],
        metavar="PATTERN",
        help="int8, int4, plan, auto: leave the weights of these names in float32, or in float16 "
        "where the target computes in it (cuda, tensorrt); a shell pattern "
        "of the checkpoint's names, such as '*.mlp.c_proj.weight', repeatable",
    )
    parser.add_argument(
        "--int8-prefill",
        action="store_true",
        help="int4, plan: a second, int8 copy of the weights for prompts and scoring; prompts run "
        "faster, and the bundle is three times as large",
    )
    add_search_options(parser)
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="STATS",
        help="a folder that neo-calibrate wrote for this model: activation outliers are moved "
        "into the weights (int8, int4), what would overflow stays float32 (fp16), and an int8 "
        "cache gets its scales",
    )
    parser.add_argument(
        "--calibrate-text",
        type=Path,
        metavar="FILE",
        help="run neo-calibrate on this text or JSONL first, and use what it finds",
    )
    parser.add_argument(
        "--kv-cache",
        default="float",
        choices=("float", "int8"),
        help="int8: keys and values in 8 bits, a scale a channel, from --calibration; the cache is "
        "a quarter as large, and decoding at long contexts faster (default: float)",
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
