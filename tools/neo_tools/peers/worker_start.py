"""Starts a worker of this folder in an interpreter where this project is not installed.

    peer_python worker_start.py worker_torch --model DIR --precision fp32 --threads 2

The parent packages are made up on the spot and point only at this folder and at `worker` beside
it, which holds what they share with our own workers. Putting a folder on `sys.path` instead would
also offer the peer everything else that is installed beside this project, in versions that are not
the peer's.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType


def main() -> None:
    """Run `neo_tools.peers.<first argument>` as the main module."""
    folder = Path(__file__).resolve().parent
    for package, path in (
        ("neo_tools", []),
        ("neo_tools.peers", [str(folder)]),
        ("neo_tools.worker", [str(folder.parent / "worker")]),
    ):
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = path
    if sys.path and Path(sys.path[0] or ".").resolve() == folder:
        del sys.path[0]  # where Python puts a script's own folder
    name = sys.argv[1]
    sys.argv = [str(folder / f"{name}.py"), *sys.argv[2:]]
    runpy.run_module(f"neo_tools.peers.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
