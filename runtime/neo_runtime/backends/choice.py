"""Choose the backend that runs a bundle.

A backend requested by name runs the bundle or raises: there is no silent fallback. "auto" takes
the backend that the bundle was exported for, falls back to the CPU if that cannot be used, and logs
its choice with the reason.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from neo_runtime.bundle.engine_record import platform_name
from neo_runtime.bundle.folder import check_installation
from neo_runtime.closable import closed_on_error
from neo_runtime.errors import (
    BundleUnsupportedError,
    DeviceError,
    EngineError,
    NeoError,
    RequestError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from neo_runtime.backends.base import Backend
    from neo_runtime.backends.device.base import Device
    from neo_runtime.bundle.folder import Bundle
    from neo_runtime.bundle.step_kernels import StepKernels
    from neo_runtime.machine.gpu import GpuFacts

__all__ = [
    "BACKENDS",
    "BackendOptions",
    "Chosen",
    "automatic_backend",
    "open_backend",
    "usable_gpu",
]

BACKENDS = ("auto", "cpu", "cuda", "tensorrt")
_GPU_TARGETS = ("cuda", "tensorrt")
"""Targets whose bundles "auto" runs on the backend of the same name."""
_LOG = logging.getLogger("neo_runtime")


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """The arguments of `neo_runtime.load` that a backend needs."""

    threads: int
    session_config: Mapping[str, str] | None = None
    keep_prepacked: bool | None = None
    device: int = 0
    verify: bool = False
    automatic: bool = False
    """Whether "auto" chose the backend. Decode kernels that cannot be used are then only a warning,
    because decode steps can run the bundle's graph instead."""


@dataclass(frozen=True)
class Chosen:
    """An open backend, and why it was chosen."""

    backend: Backend
    name: str
    """"cpu", "cuda" or "tensorrt"."""
    reason: str | None
    """The line that "auto" logs; None if there was no choice to make."""


def open_backend(bundle: Bundle, name: str, options: BackendOptions) -> Chosen:
    """Open the backend `name` for a bundle.

    Raises:
        RequestError: `name` is not in `BACKENDS`.
        BundleUnsupportedError: the bundle was exported for another backend.
        DeviceError: the GPU cannot be used.
        DependencyError: a package is missing, or the wrong one is installed.
        EngineError: no TensorRT plan fits this machine, or the decode kernels cannot be used.
    """
    if name not in BACKENDS:
        raise RequestError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    if name != "auto":
        return Chosen(_as_asked(bundle, name, options), name, None)
    preferred = bundle.manifest.target
    if preferred not in _GPU_TARGETS:
        return Chosen(_open_cpu(bundle, options), "cpu", None)
    try:
        backend = _OPENERS[preferred](bundle, replace(options, automatic=True))
    except NeoError as error:
        why = str(error)
        backend = _open_cpu(bundle, options, why)
        reason = f"backend cpu: {preferred} cannot be used ({why})"
        if bundle.manifest.target == "cuda":
            reason += "; a bundle for CUDA is slow on the CPU, so export one with --target cpu"
        _LOG.warning("%s: %s", bundle.path, reason)
        return Chosen(backend, "cpu", reason)
    reason = f"backend {preferred}: {backend.described}"
    _LOG.info("%s: %s", bundle.path, reason)
    return Chosen(backend, preferred, reason)


def _as_asked(bundle: Bundle, name: str, options: BackendOptions) -> Backend:
    try:
        return _OPENERS[name](bundle, options)
    except DeviceError as error:
        if bundle.manifest.needs_gpu:
            raise
        raise type(error)(f"{error}; backend cpu also runs this bundle, but slowly") from error


def _open_cpu(bundle: Bundle, options: BackendOptions, otherwise: str | None = None) -> Backend:
    manifest = bundle.manifest
    before = f" ({otherwise})" if otherwise else ""
    if manifest.cache.dtype == "bfloat16":
        raise BundleUnsupportedError(
            f"{bundle.path} is in bfloat16, for which onnxruntime has no CPU kernels; run it on a "
            f"GPU{before}, or export with --fp16 or --fp32"
        )
    if manifest.cache.layout == "static":
        raise BundleUnsupportedError(
            f"{bundle.path} was exported for tensorrt and runs only from a TensorRT plan{before}; "
            "build one with neo-engine, or export with --target cpu"
        )
    check_installation(manifest, bundle.path)
    from neo_runtime.backends.cpu.backend import OnnxRuntimeBackend
    from neo_runtime.backends.cpu.sessions import SessionFactory

    factory = SessionFactory(
        bundle,
        threads=options.threads,
        session_config=options.session_config,
        keep_prepacked=options.keep_prepacked,
        verify=options.verify,
    )
    return OnnxRuntimeBackend(factory)


def usable_gpu(bundle: Bundle, name: str, device: int) -> GpuFacts:
    """The GPU on which backend `name` can run a bundle, checked without loading the bundle.

    Args:
        bundle: an opened bundle.
        name: "cuda" or "tensorrt".
        device: CUDA device index.

    Raises:
        BundleUnsupportedError: the bundle was exported for another backend, or needs a newer
            onnxruntime.
        DeviceError: the GPU cannot be used.
        DependencyError: a package is missing, or the wrong one is installed.
    """
    from neo_runtime.machine.gpu import require_cuda_provider, require_gpu

    manifest = bundle.manifest
    if name == "tensorrt":
        if manifest.cache.layout != "static":
            raise BundleUnsupportedError(
                f"{bundle.path} was exported for {manifest.target} and has no TensorRT plan; "
                "export with --target tensorrt, then neo-engine"
            )
        return require_gpu(device)
    from neo_runtime.backends.cuda.backend import why_not_cuda

    reason = why_not_cuda(manifest)
    if reason is not None:
        raise BundleUnsupportedError(f"{bundle.path} does not run on backend cuda: {reason}")
    gpu = require_gpu(device)
    require_cuda_provider(gpu)
    check_installation(manifest, bundle.path)
    return gpu


def automatic_backend(bundle: Bundle, device: int) -> str:
    """The backend that "auto" is expected to choose: "cpu", "cuda" or "tensorrt".

    Nothing is loaded: "auto" may still fall back to the CPU, for instance without a fitting plan.
    """
    preferred = bundle.manifest.target
    if preferred not in _GPU_TARGETS:
        return "cpu"
    try:
        usable_gpu(bundle, preferred, device)
    except NeoError:
        return "cpu"
    return preferred


@contextmanager
def _device(index: int) -> Iterator[Device]:
    """A device for a new backend, which closes it; closed here if the backend cannot be made."""
    from neo_runtime.backends.device.locks import between_captures
    from neo_runtime.backends.device.nvidia import CudaDevice

    with between_captures():
        device = CudaDevice(index)
    try:
        yield device
    except BaseException:
        with between_captures():
            device.close()
        raise


def _open_cuda(bundle: Bundle, options: BackendOptions) -> Backend:
    gpu = usable_gpu(bundle, "cuda", options.device)
    from neo_runtime.backends.cuda.kernels import fitting_kernels

    try:
        kernels = fitting_kernels(bundle, gpu.compute_capability)
        if kernels is not None:
            return _on_cuda(bundle, gpu, options, kernels)
    except (EngineError, BundleUnsupportedError) as error:
        # The kernels are damaged, outdated, for another bundle, or not supported by the driver.
        if not options.automatic:
            raise
        _LOG.warning("decode steps run the bundle's graph instead of its decode kernels: %s", error)
    return _on_cuda(bundle, gpu, options, None)


def _on_cuda(
    bundle: Bundle, gpu: GpuFacts, options: BackendOptions, kernels: StepKernels | None
) -> Backend:
    from neo_runtime.backends.cuda.backend import CudaBackend

    with _device(options.device) as device:
        backend = CudaBackend(bundle, device, options.session_config, kernels)
    with closed_on_error(backend):
        backend.prepare()  # fails now, while "auto" can still choose, if a CUDA library is missing
    own = ", with the bundle's decode kernels" if kernels is not None else ""
    backend.described = f"{gpu.name} (device {gpu.index}){own}"
    return backend


def _open_tensorrt(bundle: Bundle, options: BackendOptions) -> Backend:
    gpu = usable_gpu(bundle, "tensorrt", options.device)
    from neo_runtime.backends.tensorrt.backend import TensorRTBackend

    with _device(options.device) as device:
        backend = TensorRTBackend(bundle, device, gpu, platform_name())
    backend.described = f"{backend.record.file} on {gpu.name} (device {gpu.index})"
    return backend


_OPENERS = {"cpu": _open_cpu, "cuda": _open_cuda, "tensorrt": _open_tensorrt}
