"""The checks of every written bundle, before it is put in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from neo_runtime.errors import VerificationError
from neo_runtime.machine.installation import require_onnxruntime

from neo_export.passes.window_caches import WINDOW_DIMENSION

if TYPE_CHECKING:
    from collections.abc import Container
    from pathlib import Path

    from neo_runtime.bundle.manifest import GraphSpec, Manifest, TensorSpec

__all__ = ["check_bundle", "first_prompt_feeds", "open_session", "run_graph", "scoring_graph"]

_PROMPT = 8  # tokens of the short run
_INLINE = 1 << 16


def check_bundle(folder: Path, manifest: Manifest) -> None:
    """Check every graph: ONNX's checker, declared shapes, no weights inside, and a short run.

    Graphs in bfloat16 are not run: onnxruntime's CPU provider has no kernels for it.

    Raises:
        VerificationError: a check fails; the message names the graph.
    """
    for name, graph in manifest.graphs.items():
        path = folder / graph.file
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            raise VerificationError(f"{graph.file} fails ONNX's checker: {error}") from error
        _check_structure_only(path, manifest.max_length)
        if manifest.precision != "bf16":
            _short_run(path, name, graph, manifest)


def scoring_graph(graphs: Container[str]) -> str:
    """Name of the graph that can return logits at every position: score, or a selective prefill."""
    return "score" if "score" in graphs else "prefill"


def open_session(path: Path) -> Any:
    """A session for a single run: no prepacking or optimization, which keeps memory small."""
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    # This provider casts float16 weights; in this order each cast runs when needed, not all first.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_graph(
    session: Any, graph: GraphSpec, ids: np.ndarray[Any, np.dtype[np.int64]], window: int | None
) -> dict[str, np.ndarray[Any, Any]]:
    """Run on token ids [B, S] as a first prompt; returns every output by name.

    Args:
        session: a session of the graph.
        graph: the graph's inputs and outputs.
        ids: token ids, int64 [B, S].
        window: `CacheSpec.window`.
    """
    feeds = first_prompt_feeds(graph, ids, window)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def first_prompt_feeds(
    graph: GraphSpec, ids: np.ndarray[Any, np.dtype[np.int64]], window: int | None
) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs for token ids [B, S] as a first prompt: empty cache, no padding."""
    batch, sequence = ids.shape
    positions = np.broadcast_to(np.arange(sequence), ids.shape).copy()
    given: dict[str, np.ndarray[Any, Any]] = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": positions,
        "logit_positions": positions,
    }
    feeds = {}
    for tensor in graph.inputs:
        if tensor.name in given:
            feeds[tensor.name] = given[tensor.name]
            continue
        heads, length, size = tensor.shape[1:]
        past = window if length == WINDOW_DIMENSION else length if isinstance(length, int) else 0
        feeds[tensor.name] = np.zeros((batch, heads, past, size), dtype=tensor.dtype)
    return feeds


def _check_structure_only(path: Path, max_length: int) -> None:
    """Check that a graph file holds only constants (scalars, the cache's slots), no weights."""
    most = max(_INLINE, 16 * max_length)
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        if tensor.ByteSize() > most:
            raise VerificationError(
                f"{path.name} holds {tensor.name} itself, {tensor.ByteSize()} bytes; expected "
                "weights only in weights.bin"
            )


def _short_run(path: Path, name: str, graph: GraphSpec, manifest: Manifest) -> None:
    length = 1 if name == "decode" else min(_PROMPT, manifest.max_length)
    ids = (np.arange(length, dtype=np.int64)[None] * 7919) % manifest.model.vocab_size
    outputs = run_graph(open_session(path), graph, ids, manifest.cache.window)
    sizes = {"batch": 1, "sequence": length, "present_sequence": length, "logits_sequence": length}
    sizes[WINDOW_DIMENSION] = manifest.cache.window or 0
    for tensor in graph.outputs:
        _check_output(graph.file, tensor, outputs[tensor.name], sizes)
    if not np.isfinite(outputs["logits"]).all():
        raise VerificationError(
            f"{graph.file} gives logits that are not finite for the token ids {ids[0].tolist()}: "
            + _overflow(manifest.cache.dtype)
        )


def _overflow(activations: str) -> str:
    """The error message for logits that overflow, with the remedy."""
    if activations == "float16":
        return (
            "float16 ends at 65504; export with --fp16 --calibrate-text FILE, which keeps what "
            "overflows in float32, or with --target cpu --fp32"
        )
    return (
        "activations are float32, so the checkpoint itself computes numbers beyond it, or holds "
        "some that are not finite; check how it was made"
    )


def _check_output(
    file: str, tensor: TensorSpec, found: np.ndarray[Any, Any], sizes: dict[str, int]
) -> None:
    expected = tuple(sizes[n] if isinstance(n, str) else n for n in tensor.shape)
    if found.shape != expected or str(found.dtype) != tensor.dtype:
        raise VerificationError(
            f"{file}: output {tensor.name} is {found.dtype}{list(found.shape)}, "
            f"expected {tensor.dtype}{list(expected)}"
        )
