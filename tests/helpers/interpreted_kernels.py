"""Runs kernels in Triton's interpreter over host memory, launch by launch.

Triton reads TRITON_INTERPRET when it is imported; `tests/conftest.py` sets it. Every address that a
program reads or writes must lie in memory that the device allocated. Programs run one after
another, in ascending or descending order of their ids. With overlapping launches, accesses before
the wait for earlier launches are recorded separately.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers.host_device import HostDevice
from neo_export.kernels.build import kernels_for
from neo_export.kernels.compiler import SCRATCH_TYPES
from neo_export.kernels.plan import POINTER_ALIGNMENT
from neo_runtime.backends.choice import Chosen
from neo_runtime.backends.cuda.backend import CudaBackend
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.bundle.step_kernels import Kernel
from neo_runtime.model import Model

if TYPE_CHECKING:
    from pathlib import Path

    from neo_export.kernels.plan import Variant
    from neo_runtime.backends.device.base import KernelCall
    from neo_runtime.bundle.step_kernels import StepKernels
    from numpy.typing import NDArray

_TORCH = {
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*fp32": torch.float32,
    "*fp64": torch.float64,
    "*u8": torch.uint8,
    "*i32": torch.int32,
    "*i64": torch.int64,
}


def uncompiled(variant: Variant, capability: str) -> Kernel:
    """A kernel whose image is the program's name, constants and types instead of machine code."""
    image = json.dumps([variant.program, dict(variant.constants), variant.types]).encode()
    return Kernel(
        name=variant.program,
        program=variant.program,
        constants=dict(variant.constants),
        types=(*variant.types, *SCRATCH_TYPES),
        image=base64.b64encode(image).decode(),
        sha256=hashlib.sha256(image).hexdigest(),
        threads=32 * variant.warps,
        shared_bytes=0,
    )


def kernels_of(bundle: Path, *, overlap: bool = False) -> StepKernels:
    """Kernels of a bundle for the interpreter."""
    return kernels_for(open_bundle(bundle), "9.0", overlap=overlap, compiler=uncompiled)


def open_interpreted(
    bundle: Path, device: HostDevice, *, overlap: bool = False, **options: Any
) -> Model:
    """A model whose decode steps run as interpreted kernels."""
    opened = open_bundle(bundle)
    backend = CudaBackend(opened, device, kernels=kernels_of(bundle, overlap=overlap))
    return Model(opened, Chosen(backend, "cuda", None), **options)


class InterpretingDevice(HostDevice):
    """A host device that launches kernels in Triton's interpreter; see the module docstring."""

    def __init__(self, *, backwards: bool = False) -> None:
        super().__init__()
        self.kernels = 0
        self.launches: list[str] = []
        self.read_early: set[int] = set()
        """Addresses of the allocations that programs read before their wait."""
        self.written: set[int] = set()
        """Addresses of the allocations that programs wrote."""
        self._backwards = backwards
        self._has_waited = False

    def load_kernel(self, image: bytes, name: str, shared_bytes: int) -> Any:
        self.kernels += 1
        return json.loads(image)

    def unload_kernel(self, kernel: Any) -> None:
        self.kernels -= 1

    def launch(self, kernel: Any, call: KernelCall) -> None:
        from neo_export.kernels import programs
        from neo_export.kernels.programs import shared
        from triton.runtime import interpreter

        _hasten(interpreter.ReduceOps)
        program, constants, types = kernel
        self.launches.append(program)
        numbers = [number for number, _ in call.arguments][: len(types)]
        pointers = [n for n, kind in zip(numbers, types, strict=True) if kind.startswith("*")]
        assert not any(n % POINTER_ALIGNMENT for n in pointers)
        given = [_argument(n, kind) for n, kind in zip(numbers, types, strict=True)]
        with pytest.MonkeyPatch.context() as patched:
            checked = _Checked(interpreter._interpreter, self)
            patched.setattr(interpreter, "_interpreter", checked)
            builder = interpreter.InterpreterBuilder
            patched.setattr(builder, "create_dot", _widened(builder.create_dot))
            patched.setattr(interpreter, "_patch_lang", _once(interpreter._patch_lang))
            patched.setattr(builder, "set_grid_idx", self._begins(builder.set_grid_idx, call))
            patched.setattr(shared, "gdc_launch_dependents", lambda: None)
            patched.setattr(shared, "gdc_wait", self._wait)
            getattr(programs, program)[call.grid](*given, **constants)

    def _begins(self, numbered: Any, call: KernelCall) -> Any:
        """Wrap `set_grid_idx`, which the interpreter calls at the start of each program."""

        def begins(builder: Any, *place: int) -> None:
            if self._backwards:
                place = tuple(size - 1 - at for size, at in zip(call.grid, place, strict=True))
            self._has_waited = not call.overlap
            numbered(builder, *place)

        return begins

    def _wait(self) -> None:
        self._has_waited = True

    def check(
        self, addresses: NDArray[Any], mask: NDArray[Any], item: int, *, writes: bool
    ) -> None:
        """Fail on an address outside all allocations, and on a write before the wait."""
        used = np.asarray(addresses).reshape(-1).astype(np.int64)
        used = used[np.broadcast_to(np.asarray(mask, dtype=bool), addresses.shape).reshape(-1)]
        starts = np.array(sorted(self.blocks), dtype=np.int64)
        ends = np.array([at + len(self.blocks[at]) for at in starts.tolist()], dtype=np.int64)
        block = np.searchsorted(starts, used, side="right") - 1
        assert (block >= 0).all(), "an address before all blocks"
        assert (used + item <= ends[block]).all(), "an address behind its block"
        touched = set(starts[block].tolist())
        if writes:
            assert self._has_waited, "written while the launch before may still run"
            self.written |= touched
        elif not self._has_waited:
            self.read_early |= touched


class _Checked:
    """Triton's interpreter with a check of every memory access."""

    def __init__(self, inner: Any, device: InterpretingDevice) -> None:
        self._inner, self._device = inner, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def load(self, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._device.check(addresses, mask, np.dtype(dtype).itemsize, writes=False)
        return self._inner.load(addresses, mask, other, dtype)

    def store(self, addresses: Any, value: Any, mask: Any) -> Any:
        self._device.check(addresses, mask, value.dtype.itemsize, writes=True)
        return self._inner.store(addresses, value, mask)

    def atomic_rmw(self, operation: Any, addresses: Any, value: Any, mask: Any, order: Any) -> Any:
        self._device.check(addresses, mask, value.dtype.itemsize, writes=True)
        return self._inner.atomic_rmw(operation, addresses, value, mask, order)


def _widened(multiply: Any) -> Any:
    """Widen bfloat16 to float32: the interpreter would multiply its bits as integers."""

    def widened(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return multiply(self, _as_float(a), _as_float(b), *others)

    return widened


def _as_float(handle: Any) -> Any:
    from triton import language
    from triton.runtime.interpreter import TensorHandle

    if handle.dtype.scalar != language.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), language.float32)


def _once(patch: Any) -> Any:
    """Patch the language's functions once per module instead of once per call, to save time."""
    found: dict[int, Any] = {}

    def once(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in found:
            found[module] = patch(function)
        return found[module]

    return once


def _hasten(reductions: Any) -> None:
    """Reduce exclusive ors with numpy: the interpreter takes minutes for those of `tl.topk`."""
    from triton import language

    slow = reductions.generic_reduce
    if slow.__name__ == "reduced":
        return

    def reduced(self: Any, given: Any) -> Any:
        if self.combine_fn is not language.standard._xor_combine:
            return slow(self, given)
        data = np.bitwise_xor.reduce(given[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return [self.to_tensor(data, given[0].dtype)]

    reductions.generic_reduce = reduced


def _argument(number: int, kind: str) -> Any:
    if not kind.startswith("*"):
        return number
    place = (ctypes.c_char * 8).from_address(number)
    return torch.frombuffer(place, dtype=_TORCH[kind], count=1)
