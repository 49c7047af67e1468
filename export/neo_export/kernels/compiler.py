"""Triton programs to machine code, on a machine with or without a GPU."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from neo_runtime.bundle.step_kernels import Kernel
from neo_runtime.errors import DependencyError, EngineError

from neo_export.kernels.plan import POINTER_ALIGNMENT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from neo_export.kernels.plan import Variant

__all__ = ["SCRATCH_TYPES", "compile_variant", "compiler_name", "signature"]

SCRATCH_TYPES = ("*i8", "*i8")
"""Two pointers that Triton gives its kernels behind the arguments; these leave them unused."""
_MISSING = "Triton cannot be imported; pip install 'neo-onnx[kernels]' brings it (Linux)"
_ALIGNED = [["tt.divisibility", POINTER_ALIGNMENT]]


def compiler_name() -> str:
    """The compiler and its version.

    Raises:
        DependencyError: Triton is not installed.
    """
    try:
        return f"triton {version('triton')}"
    except PackageNotFoundError as error:
        raise DependencyError(_MISSING) from error


def _triton() -> Any:
    # A contraction of products and sums is what GPUs are for; newer versions want it said.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        import triton
    except ImportError as error:
        raise DependencyError(f"{_MISSING} ({error})") from error
    if triton.knobs.runtime.interpret:
        raise DependencyError("TRITON_INTERPRET is set, so that Triton does not compile; unset it")
    return triton


def compile_variant(variant: Variant, capability: str) -> Kernel:
    """Compile a program for GPUs of a compute capability, such as "9.0".

    Raises:
        DependencyError: Triton is not installed.
        EngineError: it cannot compile the program for such a GPU.
    """
    triton = _triton()
    from neo_export.kernels import programs

    function = getattr(programs, variant.program)
    constants = dict(variant.constants)
    source = triton.compiler.ASTSource(
        fn=function,
        signature=signature(function.arg_names, variant),
        constexprs={(function.arg_names.index(name),): constants[name] for name in constants},
        attrs={(i,): _ALIGNED for i, kind in enumerate(variant.types) if kind.startswith("*")},
    )
    major, minor = capability.split(".")
    target = triton.backends.compiler.GPUTarget("cuda", 10 * int(major) + int(minor), 32)
    options = {"num_warps": variant.warps, "launch_pdl": bool(constants["PDL"])}
    try:
        with _hermetic(triton):
            made = triton.compile(source, target=target, options=options)
    except Exception as error:
        raise EngineError(
            f"Triton {version('triton')} cannot compile {variant.program} for compute capability "
            f"{capability}: {error}"
        ) from error
    metadata = made.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
        raise EngineError(f"{variant.program} was compiled to a form that is not launched here")
    image = made.asm["cubin"]
    return Kernel(
        name=metadata.name,
        program=variant.program,
        constants=constants,
        types=(*variant.types, *SCRATCH_TYPES),
        image=base64.b64encode(image).decode("ascii"),
        sha256=hashlib.sha256(image).hexdigest(),
        threads=32 * metadata.num_warps,
        shared_bytes=metadata.shared,
    )


@contextmanager
def _hermetic(triton: Any) -> Iterator[None]:
    """The same machine code wherever it is compiled: no paths in it, and nobody's cache.

    Triton prints what it failed to compile to stdout, which is for results.
    """
    knobs = triton.knobs
    with (
        TemporaryDirectory() as folder,
        knobs.compilation.scope(),
        knobs.cache.scope(),
        redirect_stdout(io.StringIO()),
    ):
        knobs.compilation.disable_line_info = True
        knobs.cache.dir = folder
        yield


def signature(names: list[str], variant: Variant) -> Mapping[str, str]:
    """Types by argument, as Triton takes them."""
    constants = dict(variant.constants)
    given = [name for name in names if name not in constants]
    types = dict(zip(given, variant.types, strict=True))
    return {name: types.get(name, "constexpr") for name in names}
