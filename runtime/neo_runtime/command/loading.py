"""The flags of commands that load a bundle and generate from it."""

from __future__ import annotations

import argparse
from typing import Any

from neo_runtime.backends.choice import BACKENDS
from neo_runtime.options.values import count

__all__ = ["add_loading_flags", "loading"]


def add_loading_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the flags; see `loading`."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="backend to run the bundle on (default: auto: the GPU that it was exported for if "
        "usable, else the CPU)",
    )
    parser.add_argument(
        "--device", type=int, default=0, metavar="N", help="index of the GPU (default: 0)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads per operator (default: physical cores)"
    )
    parser.add_argument(
        "--max-cache-mb",
        type=int,
        metavar="MB",
        help="limit of the key/value cache in 10^6 bytes, for each model (default: none)",
    )
    parser.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help="prompt tokens per chunk: fewer take less memory, and delay other requests less "
        "(default: 256 on a CPU, 512 with float weights, 2048 with CUDA)",
    )
    parser.add_argument(
        "--keep-prepacked",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep prepacked weights in the cache folder (default: those of quantized bundles)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="verify the checksum of the weights first"
    )


def loading(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `neo_runtime.load`."""
    limit = count(1, optional=True)("--max-cache-mb", arguments.max_cache_mb)
    return {
        "backend": arguments.backend,
        "device": arguments.device,
        "threads": arguments.threads,
        "max_cache_bytes": None if limit is None else limit * 10**6,
        "prefill_chunk": count(1, optional=True)("--prefill-chunk", arguments.prefill_chunk),
        "keep_prepacked": arguments.keep_prepacked,
        "verify": arguments.verify,
    }
