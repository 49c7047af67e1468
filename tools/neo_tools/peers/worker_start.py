"""Starts a worker of this folder in an environment where this project is not installed.

    peer_python worker_start.py worker_torch --model DIR --precision fp32 --threads 2

The parent packages are created as empty modules, whose paths contain only this folder and the
folder `worker` beside it, which has the code that all workers share. With a folder on `sys.path`
instead, the peer could also import packages installed beside this project, in the wrong versions.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType


def main() -> None:
    """Run the module `neo_tools.peers.NAME` as `__main__`; NAME is the first argument."""
    folder = Path(__file__).resolve().parent
    for package, path in (
        ("neo_tools", []),
        ("neo_tools.peers", [str(folder)]),
        ("neo_tools.worker", [str(folder.parent / "worker")]),
    ):
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = path
    if sys.path and Path(sys.path[0] or ".").resolve() == folder:
        del sys.path[0]  # the folder of the script, which Python adds
    name = sys.argv[1]
    sys.argv = [str(folder / f"{name}.py"), *sys.argv[2:]]
    runpy.run_module(f"neo_tools.peers.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
