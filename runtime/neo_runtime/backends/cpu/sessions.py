"""Create onnxruntime sessions on the CPU for the graphs of a bundle."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_runtime.backends.cpu.prepacked import WEIGHTS_FILE, PrepackedCache, warn_of_copies
from neo_runtime.backends.cpu.unused_memory import (
    Mapping,
    clean_mappings,
    forget_pages,
    mapped_within,
)
from neo_runtime.backends.failures import (
    failure_kinds,
    failure_reason,
    lacks_memory,
    translated,
)
from neo_runtime.bundle.manifest import is_quantized
from neo_runtime.bundle.onnx_external import external_tensors
from neo_runtime.errors import BundleError, HostMemoryError
from neo_runtime.machine.installation import require_onnxruntime

if TYPE_CHECKING:
    from collections import abc
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from neo_runtime.bundle.folder import Bundle
    from neo_runtime.bundle.manifest import Manifest

__all__ = [
    "SessionFactory",
    "keep_sessions_for_ever",
    "session_settings",
]

_live: weakref.WeakSet[Any] = weakref.WeakSet()


def keep_sessions_for_ever() -> None:
    """Leak the parent's sessions in a forked child.

    Destroying one would wait for its threads, which a fork does not copy. Must be called before
    anything drops the last reference to a session.
    """
    for session in list(_live):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))
    _live.clear()


def session_settings(manifest: Manifest, graph: str, *, prepacked: bool = False) -> dict[str, str]:
    """Session configuration entries for one graph of a bundle.

    Args:
        manifest: the bundle's manifest.
        graph: "prefill", "decode" or "score".
        prepacked: whether prepacked weights are kept on disk and memory-mapped.
    """
    # If waiting threads sleep, a prompt takes 2 to 4 % longer.
    settings = {"session.intra_op.allow_spinning": "1"}
    if graph == "decode":
        # Keep spinning between steps, while the next token is chosen. onnxruntime's default of
        # 40 ms would slow down other graphs that run on the same processors meanwhile.
        settings["session.intra_op.spin_duration_us"] = "2000"
    else:
        # After a prompt no further call is expected soon.
        settings["session.force_spinning_stop"] = "1"
        # With a fused bias, the CPU's FastGelu allocates a temporary of the result's size, whose
        # new pages cost more than the activation itself. For one token the fused bias is cheaper.
        settings["optimization.disable_specified_optimizers"] = "BiasGeluFusion"
    if manifest.precision == "fp32" and manifest.cache.layout == "in_place" and not prepacked:
        # Prepacking would copy all weights in each session. Float32 runs nearly as fast from the
        # file's own layout, in which all sessions share one memory-mapped file.
        settings["session.disable_prepacking"] = "1"
    return settings


class SessionFactory:
    """Makes sessions on the CPU; does not keep them."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int,
        session_config: abc.Mapping[str, str] | None = None,
        keep_prepacked: bool | None = None,
        verify: bool = False,
    ) -> None:
        """Prepare without loading a graph.

        Args:
            bundle: an opened bundle.
            threads: threads per operator.
            session_config: more session configuration entries, such as
                `{"session.intra_op.allow_spinning": "0"}`; they override `session_settings`.
            keep_prepacked: keep prepacked weights on disk and memory-map them; None: only for
                quantized bundles.
            verify: compare prepacked weights with their checksum before mapping them.
        """
        self._ort: Any = require_onnxruntime()
        self._library = Path(self._ort.capi.onnxruntime_pybind11_state.__file__)
        """onnxruntime's native library; about half of what loading a graph reads of it is not
        needed to run one."""
        self._bundle = bundle
        self.manifest = bundle.manifest
        self._threads = threads
        self._session_config = dict(session_config or {})
        self.prepacked: PrepackedCache | None = None
        """Prepacked weights on disk; None if the bundle does not need them or no folder is
        usable."""
        self.token_rows: dict[str, list[Mapping]] = {}
        """By graph: mappings of the tables with one row per token (the embedding) in the prepacked
        file, for its last session; valid while that exists. Reading a row maps the pages around it
        too: 128 different tokens map 40 MB of an int4 bundle, 90 MB of an int8 bundle."""
        # Kernels for quantized matrix products need prepacked weights.
        needed = is_quantized(self.manifest.precision)
        wanted = needed if keep_prepacked is None else keep_prepacked
        if wanted:
            try:
                self.prepacked = PrepackedCache(
                    self.manifest.digest, self._ort.__version__, verify=verify
                )
            except OSError as error:
                warn_of_copies("on disk", str(error))

    def session(self, graph: str) -> Any:
        """A new `InferenceSession` of "prefill", "decode" or "score".

        Raises:
            BundleError: onnxruntime cannot load the graph.
            HostMemoryError: the system has too little free memory to load it.
            BundleDamagedError: the bundle has changed since it was opened.
        """
        path = self._bundle.graph(graph)
        stored = self._stored(graph, path)
        session = None if stored is None else self._open_stored(graph, stored)
        if session is None and stored is not None and stored.exists():
            # The cache was not deleted meanwhile, so it is damaged in a way that sizes do not show.
            stored = self._stored(graph, path, anew=True)
            session = None if stored is None else self._open_stored(graph, stored)
        if session is None:
            session = self._open_own(graph, path, self._options(graph))
            forget_pages(clean_mappings(self._library))
        return session

    def _open_stored(self, graph: str, stored: Path) -> Any:
        """A session of a stored graph with prepacked weights; None if it cannot be loaded."""
        options = self._options(graph)
        # The graph was optimized before it was stored.
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            with mapped_within(stored.with_name(WEIGHTS_FILE), self._library) as mappings:
                session = self._open(stored, options)
        except BundleError:
            return None
        # Safe, because `session` keeps the mappings alive. Loading reads pages that running does
        # not, such as scales that are also packed with their weights.
        forget_pages(mappings)
        with contextlib.suppress(OSError, ValueError):  # the cache may be deleted or damaged
            self.token_rows[graph] = _token_rows(stored, mappings, self.manifest)
        return session

    def _stored(self, graph: str, path: Path, *, anew: bool = False) -> Path | None:
        if self.prepacked is None:
            return None
        return self.prepacked.graph(
            graph, lambda to, settings: self._store(graph, path, to, settings), anew=anew
        )

    def _store(self, graph: str, path: Path, to: Path, settings: dict[str, str]) -> None:
        options = self._options(graph)
        options.optimized_model_filepath = str(to)
        for key, value in settings.items():
            options.add_session_config_entry(key, value)
        self._open_own(graph, path, options)

    def _open_own(self, graph: str, path: Path, options: Any) -> Any:
        """A session of the bundle's own graph, checked not to have changed while it was read."""
        session = self._open(path, options)
        self._bundle.graph(graph)
        return session

    def _options(self, graph: str) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are raised; do not print them to stderr as well
        # Only decode repeats its shapes. For other graphs, a memory pattern per shape would only
        # accumulate, and an arena would keep their large activations and logits.
        options.enable_mem_pattern = graph == "decode"
        options.enable_cpu_mem_arena = graph == "decode"
        settings = session_settings(self.manifest, graph, prepacked=self.prepacked is not None)
        settings |= self._session_config
        for key, value in settings.items():
            options.add_session_config_entry(key, value)
        return options

    def _open(self, path: Path, options: Any) -> Any:
        try:
            session = self._ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            _live.add(session)
            return session
        except failure_kinds(self._ort) as error:
            reason = failure_reason(error)
            if lacks_memory(error):
                raise HostMemoryError(
                    f"the system has too little free memory to load {path} ({reason}); close other "
                    "programs, raise the memory limit (ulimit -v, or the container's), or export "
                    "with --int8"
                ) from error
            raise BundleError(
                f"onnxruntime {self._ort.__version__} cannot load {path}: {reason}; "
                "check the bundle with neo-verify, or export it again"
            ) from error

    def translated(self) -> AbstractContextManager[None]:
        """A context manager for running a session; see `failures.translated`."""
        return translated(self._ort, on_gpu=False)


def _token_rows(stored: Path, mappings: Sequence[Mapping], manifest: Manifest) -> list[Mapping]:
    """See `SessionFactory.token_rows`. onnxruntime maps stored tensors separately."""
    weights = stored.with_name(WEIGHTS_FILE).resolve()
    tensors = external_tensors(stored.read_bytes())
    vocabulary = manifest.model.vocab_size
    tables = [t for t in tensors if len(t.shape) > 1 and t.shape[0] == vocabulary]
    # Mappings begin at page boundaries.
    offsets = {table.offset - table.offset % mmap.PAGESIZE for table in tables}
    return [m for m in mappings if m.path == weights and m.offset in offsets]
