"""A bundle's graph with the values of its probes as additional outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from neo_runtime.errors import BundleError, VerificationError
from neo_runtime.machine.installation import require_onnxruntime

from neo_export.bundle.check import first_prompt_feeds, scoring_graph
from neo_export.comparison.trace import Trace
from neo_export.files.mapped_memory import scratch_array
from neo_export.passes.fold_bias import hidden_sums

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from neo_runtime.bundle.manifest import Manifest
    from numpy.typing import NDArray

__all__ = ["open_probed", "probed_model", "probed_values", "score_trace"]

_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}


def probed_values(manifest: Manifest) -> list[str]:
    """Names of the graph values that hold the places, without duplicates."""
    return list(dict.fromkeys(probe.value for probe in manifest.probes))


def probed_model(folder: Path, manifest: Manifest, graph: str) -> bytes:
    """A serialized graph whose outputs include the probed values, bfloat16 ones as float32.

    Args:
        folder: the bundle, which holds the weights.
        manifest: its manifest.
        graph: "prefill", "decode" or "score" (the graph that returns logits at every position).

    Raises:
        BundleError: the graph lacks a value that the manifest lists.
    """
    if graph == "score":
        graph = scoring_graph(manifest.graphs)
    model = ir.load(folder / manifest.graphs[graph].file)
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    values |= _sums(model)
    for name in probed_values(manifest):
        if name not in values:
            raise BundleError(
                f"{folder / manifest.graphs[graph].file} has no value {name!r}, which the "
                "manifest lists as a place to compare; export the bundle again"
            )
        model.graph.outputs.append(_as_numpy_has_it(model, values[name]))
    data: bytes = ir.serde.serialize_model(model).SerializeToString()
    return data


def _sums(model: ir.Model) -> dict[str, ir.Value]:
    """Places that the graph does not compute separately; nodes that compute them are added."""
    found = {}
    for name, (product, bias) in hidden_sums(model.graph).items():
        add = ir.node("Add", [product, bias])
        model.graph.append(add)
        found[name] = add.outputs[0]
        found[name].name, found[name].type, found[name].shape = name, product.type, product.shape
    return found


def _as_numpy_has_it(model: ir.Model, value: ir.Value) -> ir.Value:
    """The value; a bfloat16 one is cast to float32 under its name: numpy has no bfloat16."""
    if value.dtype != ir.DataType.BFLOAT16:
        return value
    name, value.name = value.name, f"{value.name}.bfloat16"
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
    wide = cast.outputs[0]
    wide.name, wide.dtype, wide.shape = name, ir.DataType.FLOAT, value.shape
    model.graph.append(cast)
    return wide


def open_probed(folder: Path, manifest: Manifest, graph: str, *, threads: int = 0) -> Any:
    """An onnxruntime session on the CPU for the graph of `probed_model`.

    Args:
        folder: the bundle.
        manifest: its manifest.
        graph: "prefill", "decode" or "score".
        threads: threads within an operator; 0 for onnxruntime's choice.

    Raises:
        BundleError: the graph lacks a value that the manifest lists.
    """
    ort = require_onnxruntime()
    data = probed_model(folder, manifest, graph)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False
    if manifest.precision in ("fp32", "fp16"):
        # Only for float weights: quantized products use other kernels when weights are prepacked.
        options.add_session_config_entry("session.disable_prepacking", "1")
    # onnxruntime would round the activations of a weight after DequantizeLinear: prevent that.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def score_trace(session: Any, manifest: Manifest, ids: NDArray[np.int64]) -> Trace:
    """Run the probed score graph on one text; the values may be in an unnamed temporary file.

    Args:
        session: from `open_probed(…, "score")`.
        manifest: the bundle's manifest.
        ids: token ids [S].
    """
    graph = manifest.graphs[scoring_graph(manifest.graphs)]
    binding = session.io_binding()
    feeds = first_prompt_feeds(graph, ids[None], manifest.cache.window)
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    wanted = {"logits", *probed_values(manifest)}
    kept: dict[str, NDArray[Any]] = {}
    for output in session.get_outputs():
        if output.name in wanted:
            kept[output.name] = array = scratch_array(
                (len(ids), output.shape[-1]), _TYPES[output.type]
            )
            shape = (1, *array.shape)
            binding.bind_output(output.name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)
    try:
        session.run_with_iobinding(binding)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise VerificationError(f"{graph.file} fails on {len(ids)} tokens: {reason}") from error
    probes = {(probe.layer, probe.place): probe for probe in manifest.probes}
    return Trace.scored(probes, kept, kept["logits"])
