"""The bundle's graphs as onnxruntime sessions on the CPU."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_runtime.backends.append import AppendStore
from neo_runtime.backends.base import Backend, CacheStore, layer_lengths
from neo_runtime.backends.in_place import InPlaceStore
from neo_runtime.errors import BundleError, NeoError, RequestError
from neo_runtime.installation import require_onnxruntime

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from neo_runtime.bundle import Bundle
    from neo_runtime.manifest import Manifest

__all__ = ["OnnxRuntimeBackend", "session_settings"]


def session_settings(manifest: Manifest, graph: str) -> dict[str, str]:
    """Session configuration entries for one graph of a bundle.

    Args:
        manifest: of the bundle.
        graph: "prefill", "decode" or "score".
    """
    settings = {"session.intra_op.allow_spinning": "1" if graph == "decode" else "0"}
    if manifest.precision == "fp32" and manifest.cache.layout == "in_place":
        # Prepacking would copy every weight once a session. Float32 decode runs as fast from
        # the file's own layout, and so the weights stay one mapping that all sessions share.
        settings["session.disable_prepacking"] = "1"
    return settings


class OnnxRuntimeBackend(Backend):
    """Sessions are made when first used, one a graph, and shared by all threads."""

    def __init__(
        self, bundle: Bundle, *, threads: int, session_config: Mapping[str, str] | None = None
    ) -> None:
        """Prepare; no graph is loaded yet.

        Args:
            bundle: an opened bundle.
            threads: threads that one operator may use.
            session_config: more session configuration entries, such as
                `{"session.intra_op.allow_spinning": "0"}`; they win over `session_settings`.
        """
        self._ort: Any = require_onnxruntime()
        self._bundle = bundle
        self._threads = threads
        self._session_config = dict(session_config or {})
        self._sessions: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._closed = False
        self.manifest = bundle.manifest

    def session(self, graph: str) -> Any:
        """The `onnxruntime.InferenceSession` of "prefill", "decode" or "score"."""
        with self._lock:
            if self._closed:
                raise NeoError("the model is closed; call neo_runtime.load again")
            if graph not in self._sessions:
                self._sessions[graph] = self._load(graph)
            return self._sessions[graph]

    def _load(self, graph: str) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what fails is raised; no second account on stderr
        # Shapes repeat in decode alone; elsewhere a plan a shape would only collect memory, and
        # score, whose logits can be large, gives its memory back to the system after each call.
        options.enable_mem_pattern = graph == "decode"
        options.enable_cpu_mem_arena = graph != "score"
        settings = session_settings(self.manifest, graph) | self._session_config
        for key, value in settings.items():
            options.add_session_config_entry(key, value)
        path = self._bundle.file(self.manifest.graphs[graph].file)
        try:
            return self._ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except self._failures() as error:
            raise BundleError(
                f"onnxruntime {self._ort.__version__} cannot load {path}: {_reason(error)}; "
                "check the bundle with neo-verify, or export it again"
            ) from error

    def _failures(self) -> tuple[type[Exception], ...]:
        """What onnxruntime raises."""
        state = self._ort.capi.onnxruntime_pybind11_state
        kinds = [kind for kind in vars(state).values() if isinstance(kind, type)]
        found = tuple(kind for kind in kinds if issubclass(kind, Exception))
        return (*found, RuntimeError)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn what onnxruntime raises while running into this project's errors."""
        try:
            yield
        except NeoError:
            raise
        except self._failures() as error:
            reason = _reason(error)
            if "out of data bounds" in reason:
                raise RequestError(
                    f"a token id or position lies outside the model's tables: {reason}"
                ) from error
            raise NeoError(f"onnxruntime failed: {reason}") from error

    def cache_bytes(self, batch: int, length: int) -> int:
        """See `Backend.cache_bytes`."""
        model, cache = self.manifest.model, self.manifest.cache
        position = 2 * model.num_heads * model.head_dim * np.dtype(cache.dtype).itemsize
        once = position * batch * sum(layer_lengths(self.manifest, length))
        # Appending writes the longer cache beside the shorter one that it reads.
        return once if cache.layout == "in_place" else 2 * once

    def open_cache(self, batch: int, length: int) -> CacheStore:
        """See `Backend.open_cache`."""
        kind = InPlaceStore if self.manifest.cache.layout == "in_place" else AppendStore
        return kind(self, batch, length)

    def score(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Backend.score`."""
        model, count = self.manifest.model, len(ids)
        dtype = self.manifest.cache.dtype
        # Empty, except where a graph wants room for a window even without a past.
        feeds: dict[str, NDArray[Any]] = {
            f"past_key_values.{layer}.{part}": np.zeros(
                (1, model.num_heads, positions, model.head_dim), dtype=dtype
            )
            for layer, positions in enumerate(layer_lengths(self.manifest, 0))
            for part in ("key", "value")
        }
        feeds["input_ids"] = ids[None, :]
        feeds["attention_mask"] = np.ones((1, count), dtype=np.int64)
        feeds["position_ids"] = np.arange(count, dtype=np.int64)[None, :]
        session = self.session("score")
        with self.translated():
            logits: NDArray[np.float32] = session.run(["logits"], feeds)[0][0]
        return logits

    def close(self) -> None:
        """See `Backend.close`."""
        with self._lock:
            self._closed = True
            self._sessions.clear()


def _reason(error: Exception) -> str:
    """The first line of onnxruntime's message, without its prefix."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].removeprefix("[ONNXRuntimeError] : ")
