"""Which backend runs a bundle: the one asked for, or, for "auto", the one it was made for.

Nothing falls back in silence. What was asked for runs, or raises; "auto" says in one line what it
took, and why, where there was something to choose.
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
"""Targets whose bundles "auto" runs on the backend of that name."""
_LOG = logging.getLogger("neo_runtime")


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """What `neo_runtime.load` passes on."""

    threads: int
    session_config: Mapping[str, str] | None = None
    keep_prepacked: bool | None = None
    device: int = 0
    verify: bool = False
    automatic: bool = False
    """Kernels that do not fit are a warning: without them decode steps run all the same."""


@dataclass(frozen=True)
class Chosen:
    """A backend, and how it came to be."""

    backend: Backend
    name: str
    """"cpu", "cuda" or "tensorrt"."""
    reason: str | None
    """The line that "auto" says; None where there was nothing to choose."""


def open_backend(bundle: Bundle, name: str, options: BackendOptions) -> Chosen:
    """Open the backend `name` for a bundle.

    Raises:
        RequestError: there is no such backend.
        BundleUnsupportedError: the bundle was made for another one.
        DeviceError: the GPU cannot be used.
        DependencyError: a package is missing, or the wrong one is installed.
        EngineError: no TensorRT plan fits.
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
            reason += "; a bundle for CUDA is slow on the CPU, export with --target cpu for it"
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
        raise type(error)(f"{error}; the backend cpu runs this bundle too, slowly") from error


def _open_cpu(bundle: Bundle, options: BackendOptions, otherwise: str | None = None) -> Backend:
    manifest = bundle.manifest
    before = f" ({otherwise})" if otherwise else ""
    if manifest.cache.dtype == "bfloat16":
        raise BundleUnsupportedError(
            f"{bundle.path} is in bfloat16, for which onnxruntime has no kernels on the CPU; run "
            f"it on a GPU{before}, or export with --fp16 or --fp32"
        )
    if manifest.cache.layout == "static":
        raise BundleUnsupportedError(
            f"{bundle.path} was exported for tensorrt and runs by a plan alone{before}; build one "
            "with neo-engine, or export with --target cpu"
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
    """The GPU on which backend `name` can run a bundle, as far as can be told without loading it.

    Args:
        bundle: an opened bundle.
        name: "cuda" or "tensorrt".
        device: of CUDA's numbers.

    Raises:
        BundleUnsupportedError: the bundle was made for another backend.
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
    """What "auto" would open a bundle with: "cpu", "cuda" or "tensorrt"."""
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
    """For a backend, which closes it; closed here where there will be none."""
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
        # Damaged, another bundle's, older, or not for this driver.
        if not options.automatic:
            raise
        _LOG.warning("decode steps run by the bundle's graph: %s", error)
    return _on_cuda(bundle, gpu, options, None)


def _on_cuda(
    bundle: Bundle, gpu: GpuFacts, options: BackendOptions, kernels: StepKernels | None
) -> Backend:
    from neo_runtime.backends.cuda.backend import CudaBackend

    with _device(options.device) as device:
        backend = CudaBackend(bundle, device, options.session_config, kernels)
    with closed_on_error(backend):
        backend.prepare()  # shows whether CUDA's libraries are there, while "auto" can choose
    own = ", decode steps by the bundle's own kernels" if kernels is not None else ""
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
