"""Sizes and checksums of what was written, against `sha256sum`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from helpers.bundles import make_bundle
from neo_export.bundle.file_records import copy_file, record_file, record_files
from neo_runtime.bundle.manifest import FileRecord
from neo_runtime.errors import OutputError


def test_every_file_but_the_manifest(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "bundle")
    records = record_files(tmp_path / "bundle")
    assert records == manifest.files
    assert list(records) == sorted(records)
    assert "engines/old.plan" in records


def test_known_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_bundle(tmp_path / "bundle")
    known = {"weights.bin": manifest.files["weights.bin"]}
    read: list[str] = []

    def spy(path: Path) -> FileRecord:
        read.append(path.name)
        return record_file(path)

    monkeypatch.setattr("neo_export.bundle.file_records.record_file", spy)
    assert record_files(tmp_path / "bundle", known) == manifest.files
    assert sorted([*read, "weights.bin"]) == sorted(Path(n).name for n in manifest.files)


@pytest.mark.parametrize("name", ["weights.bin", "absent.bin"])
def test_known_files_must_still_have_their_size(tmp_path: Path, name: str) -> None:
    make_bundle(tmp_path / "bundle")
    known = {name: FileRecord(size=63, sha256="0" * 64)}
    with pytest.raises(OutputError, match=rf"{name} has (64|None) bytes, 63 were written"):
        record_files(tmp_path / "bundle", known)


@pytest.mark.parametrize("target", ["weights.bin", "engines"])
def test_links_have_no_place_in_a_bundle(tmp_path: Path, target: str) -> None:
    make_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "link").symlink_to(target)
    with pytest.raises(OutputError, match="link is neither a file nor a folder"):
        record_files(tmp_path / "bundle")


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 1])
def test_copying_gives_the_record_of_what_it_wrote(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    copied = copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data
    assert copied == record_file(tmp_path / "b")
    assert copied.size == size
    shown = subprocess.run(["sha256sum", tmp_path / "b"], capture_output=True, check=True)
    assert shown.stdout.split()[0].decode() == copied.sha256


def test_copying_replaces_no_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    with pytest.raises(FileExistsError):
        copy_file(tmp_path / "a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"1"
