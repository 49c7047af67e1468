"""One run of the checks: where its files lie, and what several steps share."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_tools.peers.measure import Measured, run_measured

from .checkpoint import write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ROOT", "Exact", "Export", "Reference", "Session", "Settings", "say", "shown"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says."""

    size: str
    """Of the checkpoint to write; one of `checkpoint.SIZES`."""
    checkpoint: Path | None
    """Use this one instead."""
    work: Path
    """Folder for checkpoints and bundles; bundles are removed when the run ends."""
    every_step: bool
    """Decode at all positions, not at a sample."""
    keep: bool
    """Leave the bundles there."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """A bundle that was exported in this run."""

    bundle: Path
    measured: Measured
    command: str


@dataclass(frozen=True, kw_only=True)
class Reference:
    """PyTorch's logits of one text, on disk."""

    ids: Path
    logits: Path
    facts: dict[str, Any]
    measured: Measured
    command: str


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Logits in float64 of the beginning of the reference's text, on disk."""

    logits: Path
    command: str


class Session:
    """Makes what steps need, when it is first needed, once a run: nothing is left from earlier."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.work = settings.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self.bundle = cache(self._bundle)
        self._made: list[Path] = []

    @cached_property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint, written now if there is none."""
        if self.settings.checkpoint is not None:
            return self.settings.checkpoint.resolve()
        say(f"writing a {self.settings.size} checkpoint")
        return write_checkpoint(
            self.work / f"neo-{self.settings.size}", self.settings.size, progress=say
        )

    @cached_property
    def config(self) -> dict[str, Any]:
        """The checkpoint's `config.json`."""
        found: dict[str, Any] = json.loads((self.checkpoint / "config.json").read_text("utf-8"))
        return found

    @property
    def is_published_shape(self) -> bool:
        """At least as large as the 1.3B that limits of time are stated for."""
        return int(self.config["hidden_size"]) >= 2048

    def read_checkpoint(self) -> None:
        """Bring the weights into the page cache: whoever measures first shall not pay for it."""
        for file in sorted(self.checkpoint.glob("*.safetensors")):
            with file.open("rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass

    def _bundle(self, name: str, *options: str) -> Export:
        """Export the checkpoint to the folder `name`; the same arguments give the same export."""
        folder = self.scratch(name)
        self.read_checkpoint()
        output = ("-o", str(folder))
        command = ("-m", "neo_export.command.cli", str(self.checkpoint), *output, *options)
        measured = self.python(command, f"export {name}")
        return Export(bundle=folder, measured=measured, command=shown(command))

    @cached_property
    def reference(self) -> Reference:
        """What PyTorch computes, in a process that is gone afterwards."""
        ids, logits = self.scratch("text.npy"), self.scratch("logits.npy")
        command = ["-m", "tests.scale.reference", str(self.checkpoint)]
        command += ["--ids", str(ids), "--logits", str(logits)]
        facts, measured, text = self.child(command, "compute the reference")
        return Reference(ids=ids, logits=logits, facts=facts, measured=measured, command=text)

    @cached_property
    def exact(self) -> Exact:
        """The same in float64 for a text that crosses the window, straight from the formulas."""
        reference = self.reference
        logits = self.scratch("exact.npy")
        command = ["-m", "tests.scale.exact", str(self.checkpoint), "--ids", str(reference.ids)]
        command += ["--length", str(2 * int(self.config["window_size"]) + 32)]
        command += ["--output", str(logits)]
        self.python(command, "compute in float64")
        return Exact(logits=logits, command=shown(command))

    def child(self, command: Sequence[str], what: str) -> tuple[dict[str, Any], Measured, str]:
        """Run a module that writes JSON to `--output`: the JSON, its cost, the command."""
        output = self.scratch("child.json")
        whole = (*command, "--output", str(output))
        measured = self.python(whole, what)
        return json.loads(output.read_text(encoding="utf-8")), measured, shown(whole)

    def python(self, command: Sequence[str], what: str) -> Measured:
        """Run this interpreter with `tests` and the packages importable."""
        say(what)
        # -W: the environment of the caller may turn warnings of libraries into errors.
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
        path = [str(ROOT), *filter(None, [environ.get("PYTHONPATH")])]
        environ |= {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
        return run_measured((sys.executable, *command), what=what, environ=environ, timeout=7200)

    def scratch(self, name: str) -> Path:
        """A path in the work folder where nothing is; removed when the run ends."""
        path = self.work / name
        _remove(path)
        self._made.append(path)
        return path

    def drop(self, path: Path) -> None:
        """Remove what `scratch` gave, to make room on the disk."""
        if not self.settings.keep:
            _remove(path)

    def close(self) -> None:
        """Remove all that `scratch` gave."""
        for path in self._made:
            self.drop(path)


def shown(command: Sequence[str]) -> str:
    """A command as one would type it in the repository's folder."""
    words = [word.removeprefix(f"{ROOT}{os.sep}") for word in command]
    return "python " + shlex.join(words)


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(f"scale: {text}", file=sys.stderr, flush=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
