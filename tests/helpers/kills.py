"""Kills exports at random moments, and at every step, and checks what they leave behind.

Run as a program, `python -m helpers.kills MODE PARENT OLD NEW …`, so that it forks from a
process with one thread. OLD and NEW are bundles to write copies of; the result is JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from neo_export.bundle.staging import staged_folder
from neo_export.files import renames
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK = 4096


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by relative path."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def write_copy(files: dict[str, bytes], destination: Path, *, force: bool) -> None:
    """An export that makes many small writes."""
    with staged_folder(destination, force=force) as folder:
        for name, data in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            for start in range(0, len(data), CHUNK):
                os.write(descriptor, data[start : start + CHUNK])
            os.close(descriptor)


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child process; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException as error:
        print(f"child: {error!r}", file=sys.stderr)
    finally:
        os._exit(status)


def killed(pid: int) -> bool:
    """Wait for the child: True if SIGKILL ended it, False if it finished successfully."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise AssertionError(f"the child ended with status {status}")
    return status != 0


def state(destination: Path, known: dict[str, dict[str, bytes]]) -> str:
    """The name of the bundle at the destination, compared byte by byte, or "absent"."""
    if not os.path.lexists(destination):
        return "absent"
    open_bundle(destination, verify=True, check_runtime=False)
    found = snapshot(destination)
    return next(name for name, files in known.items() if files == found)


def finish(destination: Path, files: dict[str, bytes]) -> int:
    """Run the next export: it must leave only the bundle. Returns the number of leftovers."""
    leftovers = len([p for p in destination.parent.iterdir() if p != destination])
    write_copy(files, destination, force=True)
    left = [p.name for p in destination.parent.iterdir()]
    assert left == [destination.name], left
    assert snapshot(destination) == files
    return leftovers


def clear(destination: Path) -> None:
    for path in sorted(destination.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    destination.rmdir()


def random_kills(
    destination: Path, known: dict[str, dict[str, bytes]], kills: int, seed: int
) -> Counter[str]:
    """Kill that many exports at random moments; every other one replaces a bundle."""
    randomness = random.Random(seed)
    counts: Counter[str] = Counter()
    longest = 0.02
    while counts["killed"] < kills:
        replace = bool(counts["killed"] % 2)
        if not replace:
            clear(destination)

        def work(force: bool = replace) -> None:
            write_copy(known["new"], destination, force=force)

        pid = fork(work)
        time.sleep(randomness.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        was_killed = killed(pid)
        # Adjust so that two in three are killed before they end, however busy the machine is.
        longest *= 1.02 if was_killed else 0.96
        before, found = "old" if replace else "absent", state(destination, known)
        assert found in ((before, "new") if was_killed else ("new",)), (before, found)
        counts["killed" if was_killed else "finished"] += 1
        counts[f"{before} to {found}"] += was_killed
        counts["leftovers"] += finish(destination, known["old"])
    return counts


def kill_at(step: int, work: Callable[[], None]) -> None:
    """Do `work`; kill this process before or after its `step`-th call of a C function."""
    left = step

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal left
        if event in ("c_call", "c_return"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    work()
    sys.setprofile(None)


def kills_at_every_step(
    destination: Path, known: dict[str, dict[str, bytes]], *, atomic: bool, stride: int
) -> Counter[str]:
    """Replace "old" with "new", killed one step later each time until an export succeeds.

    Without an atomic swap nothing may be at the destination just then; the next export, even one
    that is refused because it has no `force`, puts the old bundle back.
    """
    if not atomic:
        renames._native_rename = lambda *_: False
    counts: Counter[str] = Counter()
    step = 0
    while not counts["finished"]:
        step += stride
        if state(destination, known) != "old":
            write_copy(known["old"], destination, force=True)

        def work(step: int = step) -> None:
            kill_at(step, lambda: write_copy(known["new"], destination, force=True))

        counts["killed" if killed(fork(work)) else "finished"] += 1
        found = state(destination, known)
        counts[found] += 1
        assert found != "absent" or not atomic
        refusal = ""
        try:
            write_copy(known["new"], destination, force=False)
        except OutputError as error:
            refusal = str(error)
        assert "use --force" in refusal, (step, refusal)
        assert state(destination, known) == ("old" if found == "absent" else found)
        left = [p.name for p in destination.parent.iterdir()]
        assert left == [destination.name], (step, left)
    return counts


def main(arguments: list[str]) -> NoReturn:
    mode, parent, old, new, *rest = arguments
    known = {"old": snapshot(Path(old)), "new": snapshot(Path(new))}
    destination = Path(parent) / "bundle"
    os.fsync = lambda _: None  # A kill loses nothing that was written; waiting for disks is slow.
    write_copy(known["old"], destination, force=False)
    if mode == "random":
        counts = random_kills(destination, known, int(rest[0]), int(rest[1]))
    else:
        counts = kills_at_every_step(
            destination, known, atomic=mode == "steps", stride=int(rest[0])
        )
    print(json.dumps(counts))
    sys.exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
