"""A bundle appears whole or not at all, whatever happens while it is written."""

# ruff: noqa: PT012, SIM117 - how a block of several statements ends is what is tested here

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.bundles import make_bundle
from helpers.kills import snapshot
from neo_export.bundle.staging import check_destination, staged_folder
from neo_export.files import output_errors, private_folder, renames
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def old(parent: Path) -> Path:
    make_bundle(parent / "bundle", weights=bytes(64))
    return parent / "bundle"


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def fill(folder: Path) -> None:
    make_bundle(folder, weights=b"new" * 100)


@contextlib.contextmanager
def nothing_changes(parent: Path) -> Iterator[None]:
    before, before_names = snapshot(parent), names(parent)
    yield
    assert (snapshot(parent), names(parent)) == (before, before_names)


class TestWritten:
    def test_where_nothing_was(self, parent: Path) -> None:
        with staged_folder(parent / "bundle", force=False) as folder:
            assert list(folder.iterdir()) == []
            fill(folder)
            assert names(parent) == [folder.parent.name]
            assert folder.parent.name.startswith(".bundle.partial-")
        assert names(parent) == ["bundle"]
        open_bundle(parent / "bundle", verify=True)

    def test_in_place_of_a_bundle(self, parent: Path, old: Path) -> None:
        before = snapshot(old)
        (old / "engines" / "older.plan").write_text("goes with the bundle")
        with staged_folder(old, force=True) as folder:
            fill(folder)
            assert snapshot(old).items() >= before.items()
        assert names(parent) == ["bundle"]
        assert (old / "weights.bin").read_bytes() == b"new" * 100
        assert not (old / "engines" / "older.plan").exists()

    @pytest.mark.parametrize("path", ["bundle", "./bundle", "../out/bundle"])
    def test_a_relative_path(
        self, parent: Path, monkeypatch: pytest.MonkeyPatch, path: str
    ) -> None:
        monkeypatch.chdir(parent)
        with staged_folder(Path(path), force=False) as folder:
            fill(folder)
        assert names(parent) == ["bundle"]

    @pytest.mark.parametrize("manifest", ["{", "[]", "{}", None])
    def test_in_place_of_a_damaged_bundle(
        self, parent: Path, old: Path, manifest: str | None
    ) -> None:
        (old / ".DS_Store").write_text("of no one")
        (old / "empty").mkdir()
        if manifest is not None:
            (old / "neo.json").write_text(manifest)
        with staged_folder(old, force=True) as folder:
            fill(folder)
        assert names(parent) == ["bundle"]
        assert not (old / ".DS_Store").exists()
        open_bundle(old, verify=True)

    def test_in_place_of_an_empty_folder(self, parent: Path) -> None:
        (parent / "bundle").mkdir()
        with staged_folder(parent / "bundle", force=True) as folder:
            fill(folder)
        open_bundle(parent / "bundle")

    def test_through_a_link_which_stays(self, parent: Path, old: Path) -> None:
        (parent / "current").symlink_to("bundle")
        with staged_folder(parent / "current", force=True) as folder:
            fill(folder)
        assert (parent / "current").readlink() == Path("bundle")
        assert (old / "weights.bin").read_bytes() == b"new" * 100
        assert names(parent) == ["bundle", "current"]

    def test_with_a_name_full_of_signs(self, parent: Path) -> None:
        for name in ("a[0-9]*.b+", ".hidden", "ü ß"):
            with staged_folder(parent / name, force=False) as folder:
                fill(folder)
        assert names(parent) == [".hidden", "a[0-9]*.b+", "ü ß"]

    def test_with_the_usual_permissions(self, parent: Path) -> None:
        (parent / "usual").mkdir()
        with staged_folder(parent / "bundle", force=False) as folder:
            assert folder.parent.stat().st_mode & 0o777 == 0o700
        assert (parent / "bundle").stat().st_mode == (parent / "usual").stat().st_mode

    def test_and_on_the_disk_before_it_is_in_place(
        self, parent: Path, old: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[str] = []
        real = os.fsync

        def fsync(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(parent)
            in_place = (old / "weights.bin").read_bytes() != bytes(64)
            synced.append(f"{'after' if in_place else 'before'} {'/'.join(path.parts[1:])}")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with staged_folder(old, force=True) as folder:
            fill(folder)
        files = {f"before new/{name}" for name in snapshot(old)}
        assert set(synced[:-2]) == files | {"before new", "before new/engines"}
        assert synced.index("before new") > synced.index("before new/engines")
        assert synced[-2:] == ["after ", "after "]  # The hidden folder and the parent.


class TestRefused:
    parent: Path

    @pytest.fixture(autouse=True)
    def _remember(self, parent: Path) -> None:
        self.parent = parent

    def refuse(self, path: Path, message: str, *, force: bool, needed: int = 0) -> None:
        with (
            nothing_changes(self.parent),
            pytest.raises(OutputError, match=message),
            staged_folder(path, force=force, needed=needed),
        ):
            pytest.fail("the work began")

    def test_a_bundle_without_force(self, old: Path) -> None:
        self.refuse(old, r"bundle exists already; use --force to replace it", force=False)

    @pytest.mark.parametrize("force", [False, True])
    def test_a_home_folder(self, parent: Path, force: bool) -> None:
        (parent / "home").mkdir()
        (parent / "home" / "thesis.tex").write_text("years of work")
        message = "not a bundle, refusing to replace it.*contents and no neo.json"
        self.refuse(parent / "home", message, force=force)

    def test_a_bundle_with_notes_in_it(self, parent: Path, old: Path) -> None:
        (old / "NOTES.md").write_text("an evening's work")
        self.refuse(old, "exists already", force=False)
        message = r"bundle holds files that are not the bundle's and would be lost: NOTES\.md; move"
        self.refuse(old, message, force=True)
        (parent / "current").symlink_to("bundle")
        self.refuse(parent / "current", r"current holds files.*NOTES\.md", force=True)
        with pytest.raises(OutputError, match="NOTES"):
            check_destination(old, force=True)
        for i in range(9):
            (old / "results").mkdir(exist_ok=True)
            (old / "results" / f"{i}.csv").write_text("")
        self.refuse(old, r"NOTES\.md, results/0\.csv, .*results/3\.csv and 5 more", force=True)

    def test_a_damaged_bundle_with_notes_in_it(self, old: Path) -> None:
        (old / "neo.json").write_text("{")
        (old / "link").symlink_to("engines")
        self.refuse(old, r"would be lost: link;", force=True)

    def test_notes_beside_plans(self, old: Path) -> None:
        engines = old / "engines"
        engines.mkdir(exist_ok=True)
        for name in ("a.plan", "a.json", "cuda-sm90.kernels", "timing.cache", ".a.plan.4711"):
            (engines / name).write_text("built")
        check_destination(old, force=True)
        (engines / "deep").mkdir()
        for name in ("why.txt", "deep/er.plan"):
            (engines / name).write_text("an evening's work")
        self.refuse(old, r"would be lost: engines/deep/er\.plan, engines/why\.txt;", force=True)

    def test_a_folder_named_like_a_manifest(self, parent: Path) -> None:
        (parent / "home" / "neo.json").mkdir(parents=True)
        self.refuse(parent / "home", "not a bundle, refusing to replace it", force=True)

    def test_a_file(self, parent: Path) -> None:
        (parent / "model.onnx").write_bytes(b"x")
        message = r"not a bundle, refusing to replace it \(it is not a folder\)"
        self.refuse(parent / "model.onnx", message, force=True)

    def test_a_circle_of_links(self, parent: Path) -> None:
        (parent / "loop").symlink_to("loop")
        self.refuse(parent / "loop", "it is not a folder", force=True)

    def test_the_root(self) -> None:
        self.refuse(Path("/"), "refusing to replace it", force=True)

    def test_a_mount_point(self, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Path, "is_mount", lambda path: path == old)
        self.refuse(old, "mount point; write to a folder inside it", force=True)

    def test_no_parent(self, parent: Path) -> None:
        path = parent / "no" / "bundle"
        self.refuse(path, rf"there is no folder {parent / 'no'}; create it", force=False)

    def test_a_file_for_a_parent(self, parent: Path) -> None:
        (parent / "file").write_bytes(b"")
        self.refuse(parent / "file" / "bundle", r"out/file is not a folder", force=False)
        self.refuse(parent / "file" / "x" / "bundle", r"there is no folder", force=False)

    def test_a_name_that_is_too_long(self, parent: Path) -> None:
        self.refuse(parent / ("n" * 250), "cannot write .*: File name too long", force=False)

    def test_a_file_system_of_the_kernel(self) -> None:
        self.refuse(Path("/proc/bundle"), "cannot write /proc/bundle: ", force=False)

    def test_too_small_a_disk(self, parent: Path) -> None:
        message = r"it needs 1000000000\.0 GB, [0-9.]+ [GMk]B are free in .*out; free space"
        self.refuse(parent / "bundle", message, force=False, needed=10**18)

    def test_a_folder_that_may_not_be_written(self) -> None:
        """As `nobody` when the tests run as root, whom no permission stops."""
        folder = Path(tempfile.mkdtemp())
        user = os.geteuid()
        try:
            folder.chmod(0o555)
            os.seteuid(65534 if user == 0 else user)
            with (
                pytest.raises(OutputError, match=r"Permission denied; you may not write in"),
                staged_folder(folder / "bundle", force=False),
            ):
                pytest.fail("the work began")
        finally:
            os.seteuid(user)
            folder.chmod(0o755)
            assert list(folder.iterdir()) == []
            folder.rmdir()


class TestFailed:
    """The block raises: what was there stays, and nothing else does."""

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
    def test_in_any_way(self, parent: Path, old: Path, error: type[BaseException]) -> None:
        with (
            nothing_changes(parent),
            pytest.raises(error),
            staged_folder(old, force=True) as folder,
        ):
            fill(folder)
            raise error

    def test_by_a_full_disk(self, parent: Path, old: Path) -> None:
        """A real one: every write to /dev/full fails with ENOSPC."""
        message = (
            rf"cannot write {old}: No space left on device; [0-9.]+ kB were written, "
            rf"[0-9.]+ [GM]B are free in {parent}; free space or .*; nothing was left behind"
        )
        with nothing_changes(parent), pytest.raises(OutputError, match=message):
            with staged_folder(old, force=True) as folder:
                fill(folder)
                (folder / "more.bin").symlink_to("/dev/full")
                with (folder / "more.bin").open("wb") as stream:
                    stream.write(b"data")

    def test_by_a_full_disk_that_is_noticed_at_the_end(
        self, parent: Path, old: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fsync(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)
        with nothing_changes(parent), pytest.raises(OutputError, match="No space left"):
            with staged_folder(old, force=True) as folder:
                fill(folder)

    def test_by_numpy_on_a_full_disk(
        self, parent: Path, old: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`ndarray.tofile` raises an OSError without a number."""
        error = OSError("16 requested and 0 written")
        with pytest.raises(OSError, match="16 requested") as kept, staged_folder(old, force=True):
            raise error
        assert kept.value is error
        full = shutil.disk_usage(parent)._replace(free=100)
        monkeypatch.setattr(output_errors.shutil, "disk_usage", lambda _: full)
        with nothing_changes(parent), pytest.raises(OutputError, match="100 bytes are free"):
            with staged_folder(old, force=True):
                raise error

    def test_by_a_limit_on_the_size_of_files(self, parent: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            with pytest.raises(OutputError, match=r"File too large; .*\(ulimit -f\)"):
                with staged_folder(parent / "bundle", force=False) as folder:
                    (folder / "weights.bin").write_bytes(bytes(5000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(parent) == []

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            (errno.EROFS, "Read-only file system; .* is read-only; choose another folder"),
            (errno.EDQUOT, "quota exceeded; .* free space"),
            (errno.EACCES, "Permission denied; you may not write"),
            (errno.EIO, r"Input/output error; check .*weights\.bin, or choose another"),
        ],
    )
    def test_by_other_trouble_with_the_disk(self, old: Path, code: int, message: str) -> None:
        with pytest.raises(OutputError, match=message), staged_folder(old, force=True) as folder:
            raise OSError(code, os.strerror(code), str(folder / "weights.bin"))

    def test_by_something_else_that_is_not_called_a_failed_write(
        self, parent: Path, old: Path
    ) -> None:
        with nothing_changes(parent), pytest.raises(FileNotFoundError) as caught:
            with staged_folder(old, force=True):
                (parent / "checkpoint.safetensors").read_bytes()
        assert not isinstance(caught.value, OutputError)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_by_a_signal(self, parent: Path, old: Path, number: signal.Signals) -> None:
        previous = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP for its children
        try:
            with (
                nothing_changes(parent),
                pytest.raises(SystemExit) as stopped,
                staged_folder(old, force=True) as folder,
            ):
                fill(folder)
                os.kill(os.getpid(), number)
            assert stopped.value.code == 128 + number
            assert signal.getsignal(number) is signal.SIG_DFL
        finally:
            signal.signal(number, previous)

    def test_a_program_keeps_its_own_way_with_signals(self, parent: Path) -> None:
        seen: list[int] = []
        previous = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
        try:
            with staged_folder(parent / "bundle", force=False) as folder:
                fill(folder)
                os.kill(os.getpid(), signal.SIGTERM)
        finally:
            signal.signal(signal.SIGTERM, previous)
        assert seen == [signal.SIGTERM]
        assert names(parent) == ["bundle"]

    def test_in_another_thread(self, parent: Path) -> None:
        def export() -> None:
            with staged_folder(parent / "bundle", force=False) as folder:
                fill(folder)

        thread = threading.Thread(target=export)
        thread.start()
        thread.join()
        assert names(parent) == ["bundle"]


class TestMeanwhile:
    """Something happens at the destination while the bundle is being written."""

    @pytest.mark.parametrize("native", [True, False])
    def test_a_bundle_appears(
        self, parent: Path, monkeypatch: pytest.MonkeyPatch, native: bool
    ) -> None:
        if not native:
            monkeypatch.setattr(renames, "_native_rename", lambda *_: False)
        with pytest.raises(OutputError, match="appeared while the bundle was being written"):
            with staged_folder(parent / "bundle", force=False) as folder:
                fill(folder)
                make_bundle(parent / "bundle", weights=b"theirs")
        assert names(parent) == ["bundle"]
        assert (parent / "bundle" / "weights.bin").read_bytes() == b"theirs"

    def test_a_file_appears(self, parent: Path) -> None:
        with pytest.raises(OutputError, match="not a bundle, refusing to replace it"):
            with staged_folder(parent / "bundle", force=True) as folder:
                fill(folder)
                (parent / "bundle").write_text("theirs")
        assert (parent / "bundle").read_text() == "theirs"
        assert names(parent) == ["bundle"]

    def test_notes_appear(self, parent: Path, old: Path) -> None:
        with pytest.raises(OutputError, match=r"would be lost: NOTES\.md; move them"):
            with staged_folder(old, force=True) as folder:
                fill(folder)
                (old / "NOTES.md").write_text("theirs")
        assert (old / "NOTES.md").read_text() == "theirs"
        assert (old / "weights.bin").read_bytes() == bytes(64)
        assert names(parent) == ["bundle"]

    def test_the_old_bundle_goes(self, parent: Path, old: Path) -> None:
        with staged_folder(old, force=True) as folder:
            fill(folder)
            shutil.rmtree(old)
        assert names(parent) == ["bundle"]
        open_bundle(old, verify=True)

    def test_two_exports_do_not_take_each_other_for_a_leftover(self, parent: Path) -> None:
        with staged_folder(parent / "bundle", force=True) as first:
            fill(first)
            with staged_folder(parent / "bundle", force=True) as second:
                make_bundle(second, weights=b"second")
            assert (parent / "bundle" / "weights.bin").read_bytes() == b"second"
        assert (parent / "bundle" / "weights.bin").read_bytes() == b"new" * 100
        assert names(parent) == ["bundle"]


class TestWithoutAnAtomicSwap:
    @pytest.fixture(autouse=True)
    def _plain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(renames, "_native_rename", lambda *_: False)

    def test_a_bundle_is_replaced(self, parent: Path, old: Path) -> None:
        with staged_folder(old, force=True) as folder:
            fill(folder)
        assert names(parent) == ["bundle"]
        assert (old / "weights.bin").read_bytes() == b"new" * 100

    def test_the_old_one_comes_back_when_the_new_one_cannot_be_moved(
        self, parent: Path, old: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = private_folder.rename_exclusive

        def fail_for_the_new_one(source: Path, target: Path) -> None:
            if source.name == "new" and not target.exists():
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))
            real(source, target)

        monkeypatch.setattr(private_folder, "rename_exclusive", fail_for_the_new_one)
        with nothing_changes(parent), pytest.raises(OutputError, match="Input/output error"):
            with staged_folder(old, force=True) as folder:
                fill(folder)

    def test_the_only_copy_is_kept_when_it_cannot_be_put_back_at_once(
        self, parent: Path, old: Path
    ) -> None:
        before = snapshot(old)
        real = private_folder.rename_exclusive

        def fail_once_the_old_one_is_away(source: Path, target: Path) -> None:
            if not target.exists():
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))
            real(source, target)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(OutputError):
            patch.setattr(private_folder, "rename_exclusive", fail_once_the_old_one_is_away)
            with staged_folder(old, force=True) as folder:
                fill(folder)
        assert not old.exists()
        with pytest.raises(OutputError, match="exists already"), staged_folder(old, force=False):
            pytest.fail("the work began")
        assert names(parent) == ["bundle"]
        assert snapshot(old) == before


class TestLeftovers:
    def leave(self, parent: Path, name: str, *, lock: bool = True) -> Path:
        root = parent / name
        make_bundle(root / "new")
        if lock:
            (root / "lock").write_bytes(b"")
        return root

    def export(self, parent: Path) -> None:
        with staged_folder(parent / "bundle", force=False) as folder:
            fill(folder)

    def test_of_the_same_destination_go(self, parent: Path) -> None:
        self.leave(parent, f".bundle.partial-{os.getpid()}-0123abcd")
        (parent / ".bundle.partial-1-0123abcd").mkdir()
        self.export(parent)
        assert names(parent) == ["bundle"]

    def test_of_a_name_full_of_signs_go_and_no_others(self, parent: Path) -> None:
        self.leave(parent, ".v1[0-9].partial-1-0123abcd")
        other = self.leave(parent, ".v11.partial-1-0123abcd").name
        with staged_folder(parent / "v1[0-9]", force=False) as folder:
            fill(folder)
        assert names(parent) == [other, "v1[0-9]"]

    def test_of_others_and_what_only_looks_like_one_stay(self, parent: Path) -> None:
        mine = [
            self.leave(parent, ".bundle2.partial-1-0123abcd").name,
            self.leave(parent, ".bundle.partial-1-0123abcd.bak").name,
            self.leave(parent, ".bundle.partial-2-0123abcd", lock=False).name,
        ]
        elsewhere = self.leave(parent.parent, "elsewhere")
        (parent / ".bundle.partial-3-0123abcd").symlink_to(elsewhere)
        self.export(parent)
        assert names(parent) == sorted([*mine, ".bundle.partial-3-0123abcd", "bundle"])
        open_bundle(elsewhere / "new")

    def test_without_locks_on_the_file_system_nothing_is_taken_for_one(
        self, parent: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def flock(*_: int) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        name = self.leave(parent, ".bundle.partial-1-0123abcd").name
        monkeypatch.setattr(private_folder.fcntl, "flock", flock)
        self.export(parent)
        assert names(parent) == [name, "bundle"]
