"""`python -m neo_tools.peers`: set up the peers, and run their exporters."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_runtime.command.command_line import OneLineParser, run_command

from neo_tools.peers import environments, exports, portable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; its result is a JSON object on stdout."""
    arguments = _parser().parse_args(argv)
    root = arguments.root.absolute() if arguments.root else None

    def work() -> int:
        result = arguments.run(arguments, root)
        print(json.dumps(result, indent=1))
        return 0 if result.get("passed", True) else 1

    return run_command("peers", work, extras="bench", unverified=1)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m neo_tools.peers",
        description="Set up the other engines (peers), and run their exporters.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--root",
            type=Path,
            metavar="FOLDER",
            help="folder of the environments (default: $NEO_PEERS, else build/peers)",
        )
        command.set_defaults(run=run)
        return command

    peers = sorted(environments.PEERS)
    precisions = "; ".join(f"{p}: {', '.join(environments.PEERS[p].precisions)}" for p in peers)
    command = add("setup", _setup, "create the environment of a peer")
    command.add_argument("peer", choices=peers, help="which engine")
    command = add(
        "export", _export, "export a checkpoint with a peer's exporter, unless that was done"
    )
    command.add_argument("peer", choices=peers, help="which engine")
    command.add_argument("model", type=Path, metavar="MODEL", help="folder of the checkpoint")
    command.add_argument(
        "--precision",
        metavar="P",
        help=f"precision (default: the first of the peer's; {precisions})",
    )
    command = add("export-time", _export_time, "measure `optimum-cli export onnx`")
    command.add_argument("model", type=Path, metavar="MODEL", help="folder of the checkpoint")
    command.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        nargs="?",
        help="folder for the export (default: it is deleted)",
    )
    command = add(
        "load-portable", _load_portable, "compare a portable bundle in Optimum with PyTorch"
    )
    command.add_argument(
        "bundle",
        type=Path,
        metavar="BUNDLE",
        help="a folder written by neo-export --target portable",
    )
    command.add_argument(
        "--model", type=Path, help="folder of its checkpoint (default: the demo model)"
    )
    return parser


def _setup(arguments: argparse.Namespace, root: Path | None) -> dict[str, Any]:
    python = environments.setup(arguments.peer, root)
    return {"peer": arguments.peer, "python": str(python)}


def _export(arguments: argparse.Namespace, root: Path | None) -> dict[str, Any]:
    precision = arguments.precision or environments.PEERS[arguments.peer].precisions[0]
    folder = exports.ensure_export(arguments.peer, arguments.model, precision, root)
    return {"peer": arguments.peer, "precision": precision, "folder": str(folder)}


def _export_time(arguments: argparse.Namespace, root: Path | None) -> dict[str, Any]:
    if arguments.out is not None:
        return asdict(exports.export_time(arguments.model, arguments.out, root))
    place = environments.root_folder(root)
    with tempfile.TemporaryDirectory(dir=place if place.is_dir() else None) as folder:
        return asdict(exports.export_time(arguments.model, Path(folder, "out"), root))


def _load_portable(arguments: argparse.Namespace, root: Path | None) -> dict[str, Any]:
    report = portable.load_portable(arguments.bundle, checkpoint=arguments.model, root=root)
    return {**asdict(report), "passed": report.passed}


if __name__ == "__main__":
    sys.exit(main())
