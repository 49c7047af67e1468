"""Copies of virtual environments in whose libraries the CPUID instruction traps."""

from __future__ import annotations

import mmap
import os
import platform
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.errors import DependencyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["build_answers", "copied", "require_tools"]

_CPUID, _UD2 = b"\x0f\xa2", b"\x0f\x0b"
_SOURCE = Path(__file__).with_name("answer_cpuid.c")
_LOAD_SEGMENT = 1


def require_tools() -> None:
    """Check the operating system, the CPU's architecture and the needed programs.

    Raises:
        DependencyError: this is not Linux on x86-64, or `cc` or `objdump` is missing.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise DependencyError(
            f"this is {platform.system()} on {platform.machine()}, but instructions can be hidden "
            "on Linux on x86-64 only"
        )
    missing = [tool for tool in ("cc", "objdump") if shutil.which(tool) is None]
    if missing:
        raise DependencyError(
            f"{' and '.join(missing)} not found in PATH; install a C compiler and binutils "
            "(Debian: apt-get install gcc libc6-dev binutils)"
        )


def build_answers(folder: Path) -> Path:
    """Compile the library that handles the trap, for LD_PRELOAD.

    Returns:
        Its path, in `folder`.

    Raises:
        DependencyError: the compiler fails.
    """
    path = folder / "answer_cpuid.so"
    command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(path), str(_SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DependencyError(f"cc cannot compile {_SOURCE.name}: {done.stderr.strip()}")
    return path


def copied(environment: Path, to: Path, tell: Callable[[str], None]) -> None:
    """Copy a virtual environment and replace CPUID in its libraries, unless `to` exists.

    The copy appears complete or not at all. Files are hard links if the file system allows it,
    except for libraries that contain CPUID.

    Args:
        environment: folder of the environment; it is not changed.
        to: folder of the copy.
        tell: called with the path of each library before it is read; large ones take a minute.
    """
    if to.exists():
        return
    partial = to.with_name(f".partial-{to.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(environment, partial, symlinks=True, copy_function=_link_or_copy)
        for library in sorted(partial.rglob("*.so*")):
            if not library.is_symlink() and library.is_file() and _may_ask(library):
                tell(str(library.relative_to(partial)))
                _replace(library)
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _link_or_copy(source: str, to: str) -> None:
    try:
        os.link(source, to)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, to)


def _may_ask(library: Path) -> bool:
    """Whether the bytes of CPUID occur, possibly as data or within another instruction."""
    with library.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return view.find(_CPUID) >= 0


def _replace(library: Path) -> None:
    """Replace every CPUID instruction by UD2, in a new file: the old one may be a hard link."""
    data = bytearray(library.read_bytes())
    segments = list(_segments(data))
    for address in _instructions(library):
        for start, offset, size in segments:
            place = address - start + offset
            if start <= address < start + size and data[place : place + 2] == _CPUID:
                data[place : place + 2] = _UD2
    changed = library.with_name(f"{library.name}.changed")
    changed.write_bytes(data)
    shutil.copymode(library, changed)
    changed.replace(library)


def _instructions(library: Path) -> Iterator[int]:
    """Addresses of the CPUID instructions, according to objdump."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith((b"\tcpuid\n", b"\tcpuid \n")):
                yield int(line.split(b":")[0], 16)


def _segments(data: bytearray) -> Iterator[tuple[int, int, int]]:
    """Address, file offset and size in bytes of each loaded segment of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    for place in range(table, table + count * size, size):
        kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", data, place)
        if kind == _LOAD_SEGMENT:
            yield address, offset, length
