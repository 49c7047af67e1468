"""Local layers keep only their window in the cache.

    before                                    after
    GroupQueryAttention(local_window_size=W)  the same with sliding_window_cache=1

The operator then evicts by itself: it takes buffers of any capacity C ≥ W for these layers, and
keeps the most recent positions at their front, contiguous. Where C ≥ the positions in use nothing
is evicted, so an engine that gives every layer full-length buffers runs the same graph. What it no
longer takes for a local layer is an empty past (C = 0).

Must not fire when no layer is global: the guard of `fuse_attention` reads the sequence's length
off a full-length buffer.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["WINDOW_DIMENSION", "window_caches"]

WINDOW_DIMENSION = "window_sequence"
"""Name of the length of a local layer's cache, in the graphs' inputs and outputs."""

_ATTRIBUTE = "sliding_window_cache"


def window_caches(model: ir.Model) -> int:
    """Apply to the whole model; returns how many layers keep only their window."""
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    local = [node for node in nodes if node.attributes.get_int("local_window_size", -1) > 0]
    if len(local) == len(nodes):
        return 0
    for node in local:
        node.attributes[_ATTRIBUTE] = ir.AttrInt64(_ATTRIBUTE, 1)
        for value in (*node.inputs[3:5], *node.outputs[1:3]):
            if value is not None and value.shape is not None:
                value.shape[2] = WINDOW_DIMENSION
    return len(local)
