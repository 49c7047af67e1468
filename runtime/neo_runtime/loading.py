"""`neo_runtime.load`: from a folder to a model on a backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from neo_runtime.backends.choice import BackendOptions, open_backend
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.closable import closed_on_error
from neo_runtime.errors import RequestError
from neo_runtime.machine.cores import chosen_threads
from neo_runtime.model import Model
from neo_runtime.options.values import count, flag

if TYPE_CHECKING:
    import os

__all__ = ["load"]


def load(
    bundle: str | os.PathLike[str],
    *,
    backend: str = "auto",
    device: int = 0,
    threads: int | None = None,
    max_cache_bytes: int | None = None,
    verify: bool = False,
    prefill_chunk: int | None = None,
    session_config: Mapping[str, str] | None = None,
    keep_prepacked: bool | None = None,
) -> Model:
    """Open a bundle. Graphs are loaded with the first request, or by `Model.prepare`.

    Args:
        bundle: a folder written by `neo-export`.
        backend: "cpu", "cuda" or "tensorrt": this one or an error. "auto": the GPU that the bundle
            was exported for if it can be used, else the CPU; the choice and its reason are logged.
        device: index of the GPU, from 0.
        threads: threads per operator; by default one per physical core available to this process.
        max_cache_bytes: limit for the key/value caches of all requests together.
        verify: also compare the checksums of the weights, and of prepacked weights in the cache
            folder (damaged ones are made again). This reads these files completely.
        prefill_chunk: prompt tokens per call of the graph, which bounds the memory for activations
            (with fused attention for all first prompts of a batch together, otherwise for each
            prompt); by default 256 on a CPU (512 with float weights), 2048 on the backend cuda, and
            the plan's `max_length` on the backend tensorrt.
        session_config: additional onnxruntime session configuration entries.
        keep_prepacked: store prepacked weights in the cache folder (`NEO_CACHE_DIR`, by default in
            the user's cache folder) and memory-map them from there: later loads are faster, and all
            graphs and processes share one copy. None: only quantized weights. True: float32 as
            well, which then computes faster, mostly in batches; the cache takes twice the bundle's
            size on disk, and the first load that much memory. False: no weights; the cache folder
            is neither read nor written, and each session prepacks quantized weights in private
            memory.

    Raises:
        BundleError: the folder is not a usable bundle (see its subclasses).
        DependencyError: onnxruntime or tokenizers is missing or broken, or onnxruntime is not the
            wheel that the backend needs.
        DeviceError: the requested GPU cannot be used, or has no room for the weights.
        EngineError: the bundle has no TensorRT plan built for this GPU, this TensorRT version and
            the bundle's present files.
        RequestError: an argument is invalid.
    """
    limits = {
        "threads": threads,
        "max_cache_bytes": max_cache_bytes,
        "prefill_chunk": prefill_chunk,
    }
    for name, value in limits.items():
        count(1, optional=True)(name, value)
    count(0)("device", device)
    flag("verify", verify)
    if keep_prepacked is not None:
        flag("keep_prepacked", keep_prepacked)
    if session_config is not None and not isinstance(session_config, Mapping):
        raise RequestError(
            f"session_config is {session_config!r}, expected a mapping of names to values"
        )
    for key, entry in (session_config or {}).items():
        if not isinstance(key, str) or not isinstance(entry, str):
            raise RequestError(
                f"session_config has {key!r}: {entry!r}, expected text for both: "
                '"session.intra_op.allow_spinning": "0"'
            )
    # Each backend checks its own engine: a TensorRT plan runs without onnxruntime.
    opened = open_bundle(bundle, verify=verify, check_runtime=False)
    options = BackendOptions(
        threads=chosen_threads(threads),
        session_config=session_config,
        keep_prepacked=keep_prepacked,
        device=device,
        verify=verify,
    )
    chosen = open_backend(opened, backend, options)
    with closed_on_error(chosen.backend):
        return Model(opened, chosen, max_cache_bytes=max_cache_bytes, prefill_chunk=prefill_chunk)
