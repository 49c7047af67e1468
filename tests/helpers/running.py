"""Runs a bundle's graphs in onnxruntime, without `neo_runtime`.

    graphs = Graphs(bundle)
    cache = graphs.cache(batch=1, length=40)
    graphs.run("prefill", ids, cache)          # logits [1, 1, V]; the cache now holds the prompt
    graphs.run("decode", next_ids, cache)

All cache layouts are supported: `in_place` and `static` bind one buffer as both past and present;
`append` feeds the tensors that the last call returned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from neo_runtime.bundle.manifest import Manifest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import onnx_ir as ir
    from numpy.typing import NDArray

SILENT = 4


def session_options(*, optimize: bool) -> Any:
    """One thread, nothing on stderr; `optimize`: whether onnxruntime optimizes the graph."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = SILENT
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    return options


class Cache:
    """Keys and values of a batch, in the layout that the bundle declares."""

    def __init__(
        self, manifest: Manifest, batch: int, length: int, local_length: int | None = None
    ) -> None:
        """Empty.

        Args:
            manifest: of the bundle.
            batch: rows.
            length: of buffers that are updated in place.
            local_length: the same for local layers; None for no more than the bundle asks for.
        """
        model, layout = manifest.model, manifest.cache
        static = layout.layout == "static"
        self.in_place = static or layout.layout == "in_place"
        self.tokens = 0
        """Positions in use, of the longest row."""
        self.length = length = manifest.max_length if static else length
        lengths = {"global": length, "local": local_length or layout.window or length}
        # Make reads of unwritten values visible in the output. A static cache masks such values
        # but still multiplies them by 0, so they must be finite.
        unseen = 1000.0 if static else -128 if layout.dtype == "int8" else np.nan
        self.tensors = {
            f"{i}.{part}": np.full(
                (batch, model.num_heads, lengths[kind] if self.in_place else 0, model.head_dim),
                unseen,
                dtype=layout.dtype,
            )
            for i, kind in enumerate(model.attention_layers)
            for part in ("key", "value")
        }

    def row(self, index: int, tokens: int) -> Cache:
        """One row of a batch as a cache of its own: the same memory where updated in place."""
        other = object.__new__(Cache)
        other.in_place, other.tokens, other.length = self.in_place, tokens, self.length
        other.tensors = {
            name: tensor[index : index + 1]
            if self.in_place
            else np.ascontiguousarray(tensor[index : index + 1, :, :tokens])
            for name, tensor in self.tensors.items()
        }
        return other


class Graphs:
    """The three graphs of a bundle; a session is opened when its graph is first run."""

    def __init__(self, bundle: Path, *, optimize: bool = True) -> None:
        self.bundle = bundle
        self.manifest = Manifest.from_json((bundle / "neo.json").read_text())
        self._optimize = optimize
        self._sessions: dict[str, Any] = {}

    def session(self, graph: str) -> Any:
        if graph not in self._sessions:
            path = self.bundle / self.manifest.graphs[graph].file
            self._sessions[graph] = ort.InferenceSession(
                str(path),
                session_options(optimize=self._optimize),
                providers=["CPUExecutionProvider"],
            )
        return self._sessions[graph]

    def cache(
        self, batch: int = 1, length: int | None = None, local_length: int | None = None
    ) -> Cache:
        """An empty cache; the lengths are for the in-place layout (None: the bundle's maximum)."""
        return Cache(self.manifest, batch, length or self.manifest.max_length, local_length)

    def run(
        self,
        graph: str,
        ids: NDArray[np.int64],
        cache: Cache | None = None,
        *,
        attention_mask: NDArray[np.int64] | None = None,
        position_ids: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Logits of new tokens [B, S]; afterwards the cache holds them too.

        Mask and positions are those of rows without padding, behind `cache.tokens`, unless given.
        Without a cache the past is empty, and forgotten.
        """
        past = cache.tokens if cache is not None else 0
        batch, new = ids.shape
        if attention_mask is None:
            attention_mask = np.ones((batch, past + new), dtype=np.int64)
        if position_ids is None:
            position_ids = np.broadcast_to(past + np.arange(new), ids.shape)
        cache = cache if cache is not None else self.cache(batch, length=new)
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": np.ascontiguousarray(ids),
            "position_ids": np.ascontiguousarray(position_ids, dtype=np.int64),
        }
        if self.manifest.cache.layout != "static":
            inputs["attention_mask"] = np.ascontiguousarray(attention_mask)
        elif graph != "decode":
            inputs["logit_positions"] = _logit_positions(graph, attention_mask, new)
            graph = "prefill"
        outputs = run_bound(self.session(graph), inputs, cache)
        cache.tokens = past + new
        logits: NDArray[np.float32] = outputs["logits"]
        return logits


def _logit_positions(graph: str, attention_mask: NDArray[np.int64], new: int) -> NDArray[np.int64]:
    """Positions that get logits: all new ones for scoring, each row's last valid one otherwise."""
    slots = np.broadcast_to(np.arange(new), (len(attention_mask), new))
    if graph == "score":
        return np.ascontiguousarray(slots)
    return np.where(attention_mask[:, -new:], slots, 0).max(axis=1, keepdims=True)


def run_bound(
    session: Any,
    inputs: Mapping[str, NDArray[Any]],
    cache: Cache,
    more: Sequence[str] = (),
) -> dict[str, NDArray[Any]]:
    """Run with `cache` bound as its layout requires; afterwards it also holds the new positions.

    Returns:
        `logits`, and whatever outputs `more` names.
    """
    binding = session.io_binding()
    for name, array in inputs.items():
        _bind(binding.bind_input, name, array)
    for name, tensor in cache.tensors.items():
        _bind(binding.bind_input, f"past_key_values.{name}", tensor)
        if cache.in_place:
            _bind(binding.bind_output, f"present.{name}", tensor)
        else:
            binding.bind_output(f"present.{name}")
    for name in ("logits", *more):
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    bound = [*(f"present.{name}" for name in cache.tensors), "logits", *more]
    outputs = dict(zip(bound, binding.get_outputs(), strict=True))
    if not cache.in_place:
        cache.tensors = {name: outputs[f"present.{name}"].numpy() for name in cache.tensors}
    return {name: outputs[name].numpy() for name in ("logits", *more)}


def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
    assert array.flags.c_contiguous, name
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def run_model(
    model: ir.Model, feeds: Mapping[str, NDArray[Any]], outputs: list[str] | None = None
) -> dict[str, NDArray[Any]]:
    """Run an in-memory graph with onnxruntime's graph optimizations turned off."""
    import onnx_ir as ir

    data = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(
        data, session_options(optimize=False), providers=["CPUExecutionProvider"]
    )
    names = outputs or [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def relative_l2(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """‖found − expected‖ / ‖expected‖ along the last axis, in float64."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    norm = np.linalg.norm(expected, axis=-1)
    error: NDArray[np.float64] = np.linalg.norm(found - expected, axis=-1) / norm
    return error


def assert_agrees(found: NDArray[Any], expected: NDArray[Any], limit: float) -> None:
    """Every position is within `limit` and, where the reference's lead exceeds the error, has
    the reference's best token.
    """
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    error = relative_l2(found, expected)
    assert error.max() <= limit, f"relative L2 {error.max():.3g} at {error.argmax()}"
    best = np.partition(expected, -2, axis=-1)
    lead = best[..., -1] - best[..., -2]
    clear = lead > np.abs(found.astype(np.float64) - expected).max(axis=-1)
    assert (found.argmax(-1) == expected.argmax(-1))[clear].all()
