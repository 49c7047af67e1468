"""Standard ONNX operators only: any runtime, any attention mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_export.passes.float16 import float16
from neo_export.passes.migrate_activations import migrate_activations
from neo_export.passes.store_transposed import store_transposed
from neo_export.targets.target import Target

if TYPE_CHECKING:
    from neo_export.passes import Pass
    from neo_export.targets.context import PassContext

__all__ = ["PORTABLE"]


def _passes(context: PassContext) -> list[Pass]:
    passes: list[Pass] = []
    if context.migration.in_graph:
        passes.append(migrate_activations(context.migration))
    if context.precision == "fp16":
        passes.append(float16(context.wide))
    passes.append(store_transposed)
    return passes


PORTABLE = Target(
    name="portable",
    precisions=("fp32", "fp16"),
    passes=_passes,
    minimum_onnxruntime="1.17.0",
)
