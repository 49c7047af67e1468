"""Compiles Triton programs to machine code (cubin), with or without a GPU."""

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
"""Two scratch pointers that Triton appends to a kernel's parameters. These kernels ignore them."""
_MISSING = "Triton cannot be imported; on Linux, pip install 'neo-onnx[kernels]'"
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
    # Fuse multiply and add into FMA whatever Triton's default is.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        import triton
    except ImportError as error:
        raise DependencyError(f"{_MISSING} ({error})") from error
    if triton.knobs.runtime.interpret:
        raise DependencyError("TRITON_INTERPRET is set, so Triton does not compile; unset it")
    return triton


def compile_variant(variant: Variant, capability: str) -> Kernel:
    """Compile a program for one compute capability, such as "9.0".

    Raises:
        DependencyError: Triton is not installed, or TRITON_INTERPRET is set.
        EngineError: Triton cannot compile the program for this capability, or the result needs
            scratch memory or thread block clusters, which the runtime does not provide.
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
        raise EngineError(
            f"Triton {version('triton')} compiled {variant.program} to a kernel with scratch "
            "memory or block clusters, which the runtime cannot launch; install the version of "
            "Triton in constraints.txt"
        )
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
    """Make compilation reproducible: no source paths in the code, and a fresh, private cache.

    Also discards stdout, to which Triton prints code that it failed to compile: the command's
    stdout is for results.
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
    """Triton's type of each argument in `names`; "constexpr" for constants."""
    constants = dict(variant.constants)
    given = [name for name in names if name not in constants]
    types = dict(zip(given, variant.types, strict=True))
    return {name: types.get(name, "constexpr") for name in names}
