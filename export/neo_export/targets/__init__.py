"""What each kind of machine runs: which passes, and what the cache looks like then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neo_runtime.errors import RequestError
from neo_runtime.manifest import CacheSpec

from neo_export.passes.float16 import float16
from neo_export.passes.fuse_attention import HEAD_SIZE_MULTIPLE, fuse_attention
from neo_export.passes.fuse_gelu import fuse_gelu
from neo_export.passes.fuse_skip_layer_norm import fuse_skip_layer_norm
from neo_export.passes.pack_qkv import pack_qkv
from neo_export.passes.store_transposed import store_transposed

if TYPE_CHECKING:
    from neo_runtime.manifest import ModelSpec

    from neo_export.passes import Pass

__all__ = ["PRECISIONS", "TARGETS", "Target", "passes_for", "target_named"]

PRECISIONS: dict[str, tuple[Pass, ...]] = {"fp32": (), "fp16": (float16,)}
"""The passes that a precision adds, after those of the target."""


@dataclass(frozen=True)
class Target:
    """A kind of machine, as a list of passes in the order in which they run."""

    name: str
    summary: str
    passes: tuple[Pass, ...]
    fused: bool
    """Uses onnxruntime's own operators: right padding, cache updated in place."""
    minimum_onnxruntime: str

    def cache(self, spec: ModelSpec, precision: str) -> CacheSpec:
        """How this target keeps keys and values for this model."""
        dtype = "float16" if precision == "fp16" else "float32"
        if self.fused and spec.head_dim % HEAD_SIZE_MULTIPLE == 0:
            return CacheSpec(layout="in_place", padding="right", dtype=dtype)
        return CacheSpec(layout="append", padding="left", dtype=dtype)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="cpu",
            summary="onnxruntime on a CPU: fused operators, cache updated in place",
            passes=(
                fuse_attention,
                pack_qkv,
                fuse_gelu,
                fuse_skip_layer_norm,
                store_transposed,
            ),
            fused=True,
            # The first whose GroupQueryAttention counts the current position into the window.
            minimum_onnxruntime="1.23.0",
        ),
        Target(
            name="portable",
            summary="standard ONNX operators only: any runtime, any attention mask",
            passes=(store_transposed,),
            fused=False,
            minimum_onnxruntime="1.17.0",
        ),
    )
}


def target_named(name: str) -> Target:
    """Look a target up.

    Raises:
        RequestError: there is no such target.
    """
    if name not in TARGETS:
        raise RequestError(f"target {name!r} is unknown, expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


def passes_for(target: Target, precision: str) -> tuple[Pass, ...]:
    """Every pass of an export, in order.

    Raises:
        RequestError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise RequestError(
            f"precision {precision!r} is unknown, expected one of {', '.join(PRECISIONS)}"
        )
    return target.passes + PRECISIONS[precision]
