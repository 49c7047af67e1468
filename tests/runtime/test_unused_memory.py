"""Memory that is not needed any more goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import mmap
import re
import sys
from pathlib import Path

import neo_runtime
import numpy as np
import pytest
from helpers.mappings import private_bytes, resident_pages
from neo_runtime.backends.cpu import heap, unused_memory

PAGE = mmap.PAGESIZE
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """64 pages, each full of its number."""
    path = tmp_path / "a file, with spaces"
    path.write_bytes(b"".join(bytes([number]) * PAGE for number in range(64)))
    return path


def mapped(path: Path) -> mmap.mmap:
    """A private mapping of a file, as onnxruntime maps weights, with every page read."""
    with path.open("rb") as opened:
        found = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    assert [found[PAGE * number] for number in range(64)] == list(range(64))
    return found


def forget(*files: Path) -> None:
    unused_memory.forget_pages(unused_memory.clean_mappings(*files))


@on_linux
def test_nothing_is_left_to_give_back_after_a_prompt(mini_bundle: Path) -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        pytest.skip("the C library has no malloc_trim")
    ids = np.arange(250)
    with neo_runtime.load(mini_bundle, threads=1) as model, model.new_cache(1, 512) as cache:
        for compute in (lambda: model.prefill(cache, [ids]), lambda: model.logits(ids)):
            compute()  # loads its graph
            # What others have left counts as in use where a call begins.
            gc.collect()
            trim(0)
            result = compute()
            before = private_bytes()
            trim(0)
            assert before - private_bytes() < 1 << 20
            del result


def test_a_c_library_without_it(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (heap, unused_memory):
        monkeypatch.setattr(module, "c_function", lambda _: None)
    with neo_runtime.load(mini_bundle, threads=1) as model:
        assert np.isfinite(model.logits(np.arange(9))).all()


@on_linux
def test_pages_are_forgotten_and_read_again(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(file.read_bytes())
    with mapped(file) as view, mapped(other):
        assert resident_pages(file) == 64
        forget(file, tmp_path / "not mapped")
        assert (resident_pages(file), resident_pages(other)) == (0, 64)
        assert [view[PAGE * number] for number in range(64)] == list(range(64))


@on_linux
def test_a_mapping_of_a_part_knows_which(file: Path) -> None:
    with file.open("rb") as opened:
        view = mmap.mmap(opened.fileno(), 2 * PAGE, access=mmap.ACCESS_READ, offset=5 * PAGE)
    [found] = unused_memory.clean_mappings(file)
    address = np.frombuffer(view, np.uint8).ctypes.data
    assert found == unused_memory.Mapping(file, 5 * PAGE, address, 2 * PAGE)


@on_linux
def test_what_was_written_to_a_mapping_stays(file: Path) -> None:
    with mapped(file) as view:
        view[3 * PAGE] = 200
        forget(file)
        assert view[3 * PAGE] == 200
        assert resident_pages(file) == 64


@on_linux
def test_a_file_is_found_through_a_link(file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(file)
    with mapped(file):
        forget(tmp_path / "link")
        assert resident_pages(file) == 0


def test_nothing_is_forgotten_where_the_system_cannot(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unused_memory, "c_function", lambda _: None)
    with mapped(file) as view:
        forget(file)
        assert view[PAGE] == 1


@on_linux
def test_what_a_block_maps_is_told_from_what_was_there(file: Path, tmp_path: Path) -> None:
    lasting = tmp_path / "lasting"
    lasting.write_bytes(file.read_bytes())
    with mapped(file) as before, mapped(lasting):
        before[3 * PAGE] = 200  # written to, and so not clean: it was there all the same
        with unused_memory.mapped_within(file, lasting) as found:
            assert found == []
            with file.open("rb") as opened:
                own = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        addresses = {mapping.path.name: mapping.start for mapping in found}
        assert addresses.keys() == {file.name, "lasting"}
        assert addresses[file.name] == np.frombuffer(own, np.uint8).ctypes.data


@on_linux
def test_nothing_is_clean_by_an_emulator_that_knows_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU's emulation of a process says 0 for every page, also of those that were written to."""
    read = Path.read_text

    def emulated(path: Path, *how: str) -> str:
        return re.sub(r"(: +)\d+ kB", r"\g<1>0 kB", read(path, *how))

    with mapped(file) as view:
        view[3 * PAGE] = 200
        monkeypatch.setattr(Path, "read_text", emulated)
        forget(file)
        assert view[3 * PAGE] == 200
        with unused_memory.mapped_within(file, file) as found:
            pass
        assert found == []


@on_linux
def test_a_system_that_shows_no_mappings(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(*_: object) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", hidden)
    assert unused_memory.clean_mappings(file) == []
