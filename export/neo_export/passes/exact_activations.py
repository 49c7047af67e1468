"""Products that do not round their activations to 8 bits.

    before                                  after
    MatMulNBits(…, accuracy_level=4)        MatMulNBits(…)

On a GPU the operator ignores the attribute: it dequantizes weights in registers and multiplies in
half precision. Without the attribute the CPU does not round activations either, so both agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["exact_activations"]


def exact_activations(model: ir.Model) -> int:
    """Apply to the whole model; returns how many products were changed."""
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
    changed = [node for node in nodes if node.attributes.pop("accuracy_level", None) is not None]
    return len(changed)
