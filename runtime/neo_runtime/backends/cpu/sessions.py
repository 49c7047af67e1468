"""onnxruntime sessions on the CPU over the graphs of a bundle."""

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
    """In a forked child, those of the parent: their end would wait for threads that are not there.

    To be called before anything else lets go of them.
    """
    for session in list(_live):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))
    _live.clear()


def session_settings(manifest: Manifest, graph: str, *, prepacked: bool = False) -> dict[str, str]:
    """Session configuration entries for one graph of a bundle.

    Args:
        manifest: of the bundle.
        graph: "prefill", "decode" or "score".
        prepacked: prepacked weights are kept on disk, and mapped from there.
    """
    # Waiting threads that sleep cost a prompt 2 to 4 %.
    settings = {"session.intra_op.allow_spinning": "1"}
    if graph == "decode":
        # Between steps they go on spinning, while the next token is chosen. By itself onnxruntime
        # spins for 40 ms, and a graph that runs meanwhile shares the processors with that.
        settings["session.intra_op.spin_duration_us"] = "2000"
    else:
        # Behind a prompt there is nothing to wait for.
        settings["session.force_spinning_stop"] = "1"
        # With the bias in it, the CPU's FastGelu takes as much memory again as its result has, and
        # new pages for it cost more than the activation. One token's bias is cheaper inside.
        settings["optimization.disable_specified_optimizers"] = "BiasGeluFusion"
    if manifest.precision == "fp32" and manifest.cache.layout == "in_place" and not prepacked:
        # Prepacking would copy every weight once a session. Float32 runs nearly as fast from the
        # file's own layout, and so the weights stay one mapping that all sessions share.
        settings["session.disable_prepacking"] = "1"
    return settings


class SessionFactory:
    """Makes sessions; holds none."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int,
        session_config: abc.Mapping[str, str] | None = None,
        keep_prepacked: bool | None = None,
        verify: bool = False,
    ) -> None:
        """Prepare; no graph is loaded yet.

        Args:
            bundle: an opened bundle.
            threads: threads that one operator may use.
            session_config: more session configuration entries, such as
                `{"session.intra_op.allow_spinning": "0"}`; they win over `session_settings`.
            keep_prepacked: store prepacked weights, and map stored ones; None: only those of
                quantized products.
            verify: compare prepacked weights with their checksum before they are mapped.
        """
        self._ort: Any = require_onnxruntime()
        self._library = Path(self._ort.capi.onnxruntime_pybind11_state.__file__)
        """Of which loading a graph reads half that running does not."""
        self._bundle = bundle
        self.manifest = bundle.manifest
        self._threads = threads
        self._session_config = dict(session_config or {})
        self.prepacked: PrepackedCache | None = None
        """Prepacked weights on disk; None where this bundle has no use for them."""
        self.token_rows: dict[str, list[Mapping]] = {}
        """The tables with a row a token, beside the prepacked ones, of the last session of each
        graph; for use while that lives. Every new token maps all that the system keeps together
        around its row: a prompt of 128 different ones 40 MB of int4's, 90 MB of int8's."""
        # Kernels of quantized products need prepacked weights.
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
            NeoError: there is no memory for it.
            BundleDamagedError: the bundle is no longer what was opened.
        """
        path = self._bundle.graph(graph)
        stored = self._stored(graph, path)
        session = None if stored is None else self._open_stored(graph, stored)
        if session is None and stored is not None and stored.exists():
            # Nobody emptied the cache: it is damaged in a way that sizes do not show.
            stored = self._stored(graph, path, anew=True)
            session = None if stored is None else self._open_stored(graph, stored)
        if session is None:
            session = self._open_own(graph, path, self._options(graph))
            forget_pages(clean_mappings(self._library))
        return session

    def _open_stored(self, graph: str, stored: Path) -> Any:
        """A session over prepacked weights; None where they cannot be loaded."""
        options = self._options(graph)
        # It was optimized when it was stored.
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            with mapped_within(stored.with_name(WEIGHTS_FILE), self._library) as mappings:
                session = self._open(stored, options)
        except BundleError:
            return None
        # The session is held here, so its mappings are there. Loading reads what running does not:
        # scales that are packed with their weights.
        forget_pages(mappings)
        with contextlib.suppress(OSError, ValueError):  # the cache, again
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
        """A session of the bundle's own graph, of which nothing changed while it was read."""
        session = self._open(path, options)
        self._bundle.graph(graph)
        return session

    def _options(self, graph: str) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what fails is raised; no second account on stderr
        # Shapes repeat in decode alone. Elsewhere a plan a shape would only collect memory, and
        # activations and logits can be large: they go back to the system after each call.
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
                    f"the system gives no memory to load {path} ({reason}); close other programs, "
                    "raise this process's limit (ulimit -v, the container's), or export with --int8"
                ) from error
            raise BundleError(
                f"onnxruntime {self._ort.__version__} cannot load {path}: {reason}; "
                "check the bundle with neo-verify, or export it again"
            ) from error

    def translated(self) -> AbstractContextManager[None]:
        """Turn what onnxruntime raises while running into this project's errors."""
        return translated(self._ort, on_gpu=False)


def _token_rows(stored: Path, mappings: Sequence[Mapping], manifest: Manifest) -> list[Mapping]:
    """See `SessionFactory.token_rows`; onnxruntime maps each tensor of a stored graph by itself."""
    weights = stored.with_name(WEIGHTS_FILE).resolve()
    tensors = external_tensors(stored.read_bytes())
    vocabulary = manifest.model.vocab_size
    tables = [t for t in tensors if len(t.shape) > 1 and t.shape[0] == vocabulary]
    # A mapping begins where a page does.
    offsets = {table.offset - table.offset % mmap.PAGESIZE for table in tables}
    return [m for m in mappings if m.path == weights and m.offset in offsets]
