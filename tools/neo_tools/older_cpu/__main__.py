"""`python -m neo_tools.older_cpu FOLDER COMMAND …`: run a command without the newest instructions.

FOLDER keeps copies of this environment and of the peers' ($NEO_PEERS, else build/peers), made in
the first run (minutes; hard links, so they take little space) and reused by later ones. Delete it
after an environment has changed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.command.command_line import OneLineParser, run_command
from neo_runtime.errors import RequestError

from neo_tools.older_cpu import ENVIRONMENT_VARIABLE, HIDDEN
from neo_tools.older_cpu.copies import build_answers, copied, require_tools
from neo_tools.peers.environments import PEERS, is_ready, root_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_PROGRAM = "python -m neo_tools.older_cpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; 2 if it cannot be run."""
    parser = OneLineParser(prog=_PROGRAM, description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("command", metavar="COMMAND", help='"neo-bench", "python", "pytest", …')
    parser.add_argument("arguments", metavar="…", nargs=argparse.REMAINDER)
    found = parser.parse_args(argv)
    folder = found.folder.absolute()
    return run_command(
        _PROGRAM, lambda: _run(folder, found.command, found.arguments), extras="bench"
    )


def _run(folder: Path, command: str, arguments: list[str]) -> int:
    require_tools()
    if sys.prefix == sys.base_prefix:
        raise RequestError(
            f"{sys.executable} is not in a virtual environment, and only such environments can be "
            "copied; run this command in one"
        )
    program = Path(sys.prefix, "bin", command)
    if not program.is_file():
        raise RequestError(f"{program} not found; COMMAND must be a program of this environment")
    folder.mkdir(parents=True, exist_ok=True)
    answers = build_answers(folder)
    here = folder / "environment"
    _copy(Path(sys.prefix), here)
    peers = _copy_peers(folder / "peers")
    python = here / "bin" / "python"
    script = [] if command.startswith("python") else [str(here / "bin" / command)]
    environ = os.environ | {
        "LD_PRELOAD": str(answers),
        "NEO_CACHE_DIR": str(folder / "cache"),  # other kernels, whose prepacked weights differ
        "NEO_PEERS": str(peers),
        "PYTHONFAULTHANDLER": "",  # its handler would replace the one for the trap
        ENVIRONMENT_VARIABLE: HIDDEN,
    }
    return subprocess.run([str(python), *script, *arguments], env=environ, check=False).returncode


def _copy(environment: Path, to: Path) -> None:
    copied(environment, to, lambda library: print(f"{to.name}: {library}", file=sys.stderr))


def _copy_peers(to: Path) -> Path:
    """Copy the environments of the peers that are set up, and link to their exported models."""
    root = root_folder(None)
    to.mkdir(exist_ok=True)
    for name in PEERS:
        if is_ready(name):
            _copy(root / name, to / name)
    models = to / "models"
    if (root / "models").is_dir() and not models.exists():
        models.symlink_to((root / "models").resolve())
    return to


if __name__ == "__main__":
    sys.exit(main())
