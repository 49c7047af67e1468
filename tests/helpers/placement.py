"""Finds values that onnxruntime's CUDA provider would copy between host and device.

Its rules (`GetCpuPreferredNodes`, and each kernel's `InputMemoryType`): Shape outputs are
on the host; values computed only from host values are computed on the host; some operators read
some inputs there. Every other crossing needs a copy node, and a graph with one cannot be
captured (`enable_cuda_graph`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

HOST_INPUTS: dict[str, set[int]] = {
    "Expand": {1},
    "GroupQueryAttention": {6},  # total_sequence_length
    "Range": {0, 1, 2},
    "ReduceMax": {1},
    "ReduceSum": {1},
    "Reshape": {1},
    "Slice": {1, 2, 3, 4},
    "Squeeze": {1},
    "TopK": {1},
    "Unsqueeze": {1},
}
"""Indices of the inputs that CUDA kernels read from host memory, by operator."""


def copies(graph: onnx.GraphProto) -> list[str]:
    """Each value that would be copied between host and device, with the node that reads it."""
    stored = {tensor.name for tensor in graph.initializer} | {""}
    on_host: set[str] = set()
    found = []
    for node in graph.node:
        read = HOST_INPUTS.get(node.op_type, set())
        computed = [name for name in node.input if name not in stored]
        is_constant = node.op_type == "Constant" or not computed
        if node.op_type == "Shape" or is_constant or all(name in on_host for name in computed):
            if node.op_type == "Range" and not is_constant:
                found.append(f"{node.output[0]} (placed on the host) of {node.op_type}")
            stored.update(node.output if is_constant else ())
            on_host.update(node.output)
            continue
        for place, name in enumerate(node.input):
            if name in stored:
                continue
            if (name in on_host) != (place in read):
                found.append(f"{name} read by {node.op_type} {node.name}")
    return found
