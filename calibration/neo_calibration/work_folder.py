"""The folder of an unfinished calibration, from which the next call resumes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from neo_export.files.lost_files import files_inside, refuse_to_lose
from neo_export.files.mapped_memory import take_room
from neo_export.files.output_errors import as_output_error
from neo_export.files.renames import exchange, rename_exclusive
from neo_export.statistics.header import STATISTICS_NAME, PlaceStatistics
from neo_runtime.errors import OutputError
from neo_runtime.json_input import parse_json

from neo_calibration.arrays import write_arrays, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from neo_calibration.accumulate import PlaceResult

__all__ = ["WorkFolder"]

_REQUEST = "request.json"
_ARRAYS = re.compile(r"transformer(\.\w+)*\.safetensors")


class WorkFolder:
    """The hidden folder beside the destination; see `neo_calibration.collect` for its layout."""

    def __init__(self, root: Path, target: Path) -> None:
        self.root, self.target = root, target
        self.new, self._parts = root / "new", root / "parts"

    @classmethod
    @contextmanager
    def acquire(cls, output: Path, request: Mapping[str, Any], *, force: bool) -> Iterator[Self]:
        """Resume the unfinished work of the same request, or start anew.

        If the block raises, the folder stays, with all finished parts.

        Raises:
            OutputError: `output` exists, another process works on it, or it cannot be written.
        """
        target = Path(os.path.realpath(output))
        _check_target(target, force=force)
        root = target.with_name(f".{target.name}.calibrating")
        try:
            root.mkdir(exist_ok=True)
            with (root / "lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise OutputError(
                        f"{target} is being written by another neo-calibrate; wait for it"
                    ) from None
                work = cls(root, target)
                work._begin(json.dumps(request, indent=1, sort_keys=True) + "\n")
                yield work
        except OSError as error:
            left = "nothing was left behind"
            if root.is_dir():
                left = f"what is finished is in {root}, and the same command goes on from there"
            if failure := as_output_error(error, output, root, left):
                raise failure from error
            raise

    def _begin(self, request: str) -> None:
        file = self.root / _REQUEST
        same = file.is_file() and file.read_text(encoding="utf-8") == request
        if same and self.new.is_dir():
            return
        file.unlink(missing_ok=True)  # first, so that a half-removed folder matches no request
        for entry in self.root.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.new.mkdir()
        self._parts.mkdir()
        write_whole(file, request)

    def file_name(self, name: str) -> str:
        """Path of a part's safetensors file, relative to the folder of statistics."""
        return f"{name}.safetensors"

    def has_part(self, name: str) -> bool:
        """Whether a part is finished."""
        return (self._parts / f"{name}.json").is_file()

    def write_part(
        self,
        name: str,
        results: Sequence[PlaceResult],
        scores: NDArray[np.float32] | None = None,
    ) -> None:
        """Write a part's arrays, then its summary, whose presence marks the part as finished."""
        arrays = {key: array for result in results for key, array in result.arrays.items()}
        write_arrays(self.new / self.file_name(name), arrays)
        places = {r.place: asdict(r.summary) for r in results}
        heads = [] if scores is None else [float(score) for score in scores]
        write_whole(
            self._parts / f"{name}.json", json.dumps({"places": places, "score_max": heads})
        )

    def read_part(self, name: str) -> tuple[dict[str, PlaceStatistics], tuple[float, ...]]:
        """Summaries by place, and the largest score of each head (empty if the part has none)."""
        raw = parse_json((self._parts / f"{name}.json").read_text(encoding="utf-8"))
        places = {
            place: PlaceStatistics(**(s | {"outlier_channels": tuple(s["outlier_channels"])}))
            for place, s in raw["places"].items()
        }
        return places, tuple(raw["score_max"])

    def hidden(self, layer: int, tokens: int, width: int) -> NDArray[np.float32]:
        """Input of a layer, float32 [tokens, width], memory-mapped."""
        return np.memmap(self.root / f"hidden.{layer}", np.float32, "r", shape=(tokens, width))

    @contextmanager
    def hidden_to_write(self, layer: int, tokens: int, width: int) -> Iterator[NDArray[np.float32]]:
        """The same array to be filled; it becomes visible when the block ends normally."""
        partial = self.root / f"hidden.{layer}.partial"
        try:
            with partial.open("wb") as file:
                take_room(file, 4 * tokens * width, str(self.root.parent))
        except OutputError:
            partial.unlink()  # free its disk space
            raise
        rows: np.memmap[Any, Any] = np.memmap(partial, np.float32, "r+", shape=(tokens, width))
        yield rows
        rows.flush()
        partial.replace(self.root / f"hidden.{layer}")

    def forget_hidden(self, layer: int) -> None:
        """Remove the input of a finished layer."""
        (self.root / f"hidden.{layer}").unlink(missing_ok=True)

    def finish(self, *, force: bool) -> None:
        """Put the folder of statistics in place, and remove everything else."""
        try:
            rename_exclusive(self.new, self.target)
        except FileExistsError:
            _check_target(self.target, force=force)
            # After the exchange the old folder is here, and it must not match a request.
            (self.root / _REQUEST).unlink()
            if not exchange(self.new, self.target):
                shutil.rmtree(self.target)
                self.new.rename(self.target)
        shutil.rmtree(self.root, ignore_errors=True)


def _check_target(target: Path, *, force: bool) -> None:
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {target}: there is no folder {target.parent}; make it")
    if not os.path.lexists(target):
        return
    if not force:
        raise OutputError(f"{target} exists already; use --force to replace it")
    empty = target.is_dir() and not any(target.iterdir())
    if not (empty or (target / STATISTICS_NAME).is_file()):
        raise OutputError(
            f"{target} holds no {STATISTICS_NAME}, refusing to replace it; choose another path"
        )
    refuse_to_lose(_foreign_files(target), target, "of statistics")


def _foreign_files(target: Path) -> list[str]:
    """Files that `WorkFolder` does not write, sorted."""
    header = target / STATISTICS_NAME
    found = [
        path
        for path in files_inside(target)
        if path != STATISTICS_NAME and not _ARRAYS.fullmatch(path)
    ]
    # Damaged statistics may be replaced; files that never were statistics are the user's.
    with suppress(ValueError, OSError):
        raw = parse_json(header.read_bytes())
        if not (isinstance(raw, dict) and "schema_version" in raw) and header.is_file():
            found.append(STATISTICS_NAME)
    return sorted(found)
