"""Instructions are hidden from copies of libraries, and from nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from neo_runtime.errors import DependencyError
from neo_tools.older_cpu import ENVIRONMENT_VARIABLE, HIDDEN, __main__, copies

REASON = None
try:
    copies.require_tools()
except DependencyError as error:
    REASON = str(error)
possible = pytest.mark.skipif(REASON is not None, reason=REASON or "")

SOURCE = """
#include <cpuid.h>
/* CPUID's bytes as data, which must stay. */
const unsigned char bytes[4] = {0x0f, 0xa2, 0x0f, 0xa2};
unsigned ask(unsigned leaf, unsigned subleaf, unsigned index) {
  unsigned found[4];
  __cpuid_count(leaf, subleaf, found[0], found[1], found[2], found[3]);
  return found[index];
}
"""
ASK = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.ask.restype = ctypes.c_uint32
asked = [(0, 0), (1, 0), (7, 0), (7, 1), (13, 0)]
print([[library.ask(leaf, sub, index) for index in range(4)] for leaf, sub in asked])
print(bytes((ctypes.c_ubyte * 4).in_dll(library, "bytes")).hex())
"""
AVX2, AVX512F, AVX512_VNNI, AVX_VNNI, AVX512_BF16 = 1 << 5, 1 << 16, 1 << 11, 1 << 4, 1 << 5


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with one library that asks the CPU."""
    folder = tmp_path_factory.mktemp("original") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (folder / "ask.c").write_text(SOURCE)
    library = folder / "lib" / "libask.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, folder / "ask.c"], check=True)
    (folder / "lib" / "libask.so").symlink_to("libask.so.1")
    (folder / "lib" / "empty.so").touch()
    (folder / "lib" / "text.so").write_bytes(b"not a library \x0f\xa2")
    return folder


def ask(library: Path, preload: Path | None = None) -> tuple[list[list[int]], str]:
    environ = dict(os.environ) | ({"LD_PRELOAD": str(preload)} if preload else {})
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(library)],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    answers, data = done.stdout.splitlines()
    return json.loads(answers), data


@possible
def test_a_copy_is_answered_without_the_newest_instructions(
    environment: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    before = (environment / "lib" / "libask.so.1").read_bytes()
    copies.copied(environment, tmp_path / "copy", told.append)
    assert told == ["lib/libask.so.1"]
    assert (environment / "lib" / "libask.so.1").read_bytes() == before
    found, data = ask(tmp_path / "copy" / "lib" / "libask.so", copies.build_answers(tmp_path))
    expected, _ = ask(environment / "lib" / "libask.so")
    assert data == "0fa20fa2"
    for index in (0, 4):  # the vendor, the saved state
        assert found[index] == expected[index]
    # Leaf 1 tells which processor asks.
    assert [found[1][0], *found[1][2:]] == [expected[1][0], *expected[1][2:]]
    assert found[2][0] == expected[2][0]
    assert found[2][1] & AVX2 == expected[2][1] & AVX2
    assert not found[2][1] & AVX512F
    assert not found[2][2] & AVX512_VNNI
    assert not found[3][0] & (AVX_VNNI | AVX512_BF16)
    # avx512f, dq, ifma, pf, er, cd, bw, vl, and avx512_vbmi, vbmi2, vnni, bitalg, vpopcntdq: all
    # of these, and nothing else.
    assert found[2][1] == expected[2][1] & ~0xDC230000
    assert found[2][2] == expected[2][2] & ~0x5842


@possible
def test_the_copy_asks_nobody_else(environment: Path, tmp_path: Path) -> None:
    copies.copied(environment, tmp_path / "copy", lambda line: None)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        ask(tmp_path / "copy" / "lib" / "libask.so")
    assert caught.value.returncode == -4, "SIGILL"


@possible
def test_a_copy_is_made_once_and_whole_or_not_at_all(environment: Path, tmp_path: Path) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copies.copied(environment, tmp_path / "copy", interrupt)
    assert list(tmp_path.iterdir()) == []
    copies.copied(environment, tmp_path / "copy", lambda line: None)
    # Hard links, but for the library that was changed; links stay links.
    linked = (tmp_path / "copy" / "ask.c").stat().st_ino
    assert linked == (environment / "ask.c").stat().st_ino
    assert (tmp_path / "copy" / "lib" / "libask.so").readlink() == Path("libask.so.1")
    copies.copied(environment, tmp_path / "copy", interrupt)


@possible
def test_a_command_runs_in_the_copy(
    environment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "prefix", str(environment))
    monkeypatch.setenv("NEO_PEERS", str(tmp_path / "no peers"))
    code = (
        "import os, sys; print(sys.prefix); print(os.environ['NEO_CACHE_DIR']); "
        f"print(os.environ['{ENVIRONMENT_VARIABLE}']); sys.exit(7)"
    )
    folder = tmp_path / "folder"
    assert __main__.main([str(folder), "python", "-c", code]) == 7
    out, err = capfd.readouterr()
    assert out.splitlines() == [str(folder / "environment"), str(folder / "cache"), HIDDEN]
    assert err == "environment: lib/libask.so.1\n"
    assert __main__.main([str(folder), "python", "-c", ""]) == 0
    assert capfd.readouterr().err == "", "the copy is there"


@possible
def test_a_command_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([str(tmp_path / "folder"), "neo-nothing"]) == 2
    assert "neo-nothing not found; COMMAND must be a program of this environment" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "folder").exists()


@possible
def test_without_a_virtual_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert __main__.main([str(tmp_path / "folder"), "python"]) == 2
    assert "is not in a virtual environment" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_without_the_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(copies.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert __main__.main([str(tmp_path), "python"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "cc and objdump not found in PATH; install" in line


@pytest.mark.parametrize(("system", "machine"), [("darwin", "x86_64"), ("linux", "aarch64")])
def test_on_another_system(system: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(copies.platform, "machine", lambda: machine)
    with pytest.raises(DependencyError, match="on Linux on x86-64 only"):
        copies.require_tools()
