"""How every command line ends: an exit status and, where something went wrong, one line on stderr.

Imports nothing heavy: `--help` and wrong usage answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from neo_runtime.errors import NeoError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OneLineParser", "add_version", "discard_stdout", "one_line", "run_command"]

_WRONG, _INTERRUPTED, _BROKEN_PIPE = 2, 130, 141


class OneLineParser(argparse.ArgumentParser):
    """For commands whose usage is long: a mistake is one line, without all of it."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit."""
        self.exit(_WRONG, f"{self.prog}: {message}; see {self.prog} --help\n")


class _ShowVersion(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        from importlib.metadata import version

        print(f"{parser.prog} {version('neo-onnx')}")
        parser.exit()


def add_version(parser: argparse.ArgumentParser) -> None:
    """Let a command take `--version`."""
    parser.add_argument(
        "--version", action=_ShowVersion, nargs=0, help="show the version, and exit"
    )


def one_line(message: str) -> str:
    """The lines of a message side by side; spaces within a line stay, they may be a path's."""
    return " ".join(line.strip() for line in message.splitlines() if line.strip())


def run_command(
    program: str,
    work: Callable[[], int],
    *,
    extras: str,
    interrupted: str | None = None,
    unverified: int = _WRONG,
    wording: Callable[[str], str] = one_line,
) -> int:
    """Do the work of a command line.

    Args:
        program: what lines on stderr begin with.
        work: returns the exit status. A progress line on stderr is closed when it ends, in
            whatever way.
        extras: of the package, with commas: those that bring what the command imports.
        interrupted: what Ctrl-C leaves behind, in words; None for nothing worth a line. Where it
            depends on how far the work is, the work raises a KeyboardInterrupt that says so.
        unverified: the status where what was written or run does not compute what it should.
        wording: makes one line of an error's message.

    Returns:
        The status of `work`; 2 for an error, 130 after Ctrl-C, 141 where the reader of stdout
        went away. An error that nobody foresaw is raised: its traceback is what helps then.
    """
    try:
        status = work()
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        said = str(stop) or interrupted
        return _INTERRUPTED if said is None else _fail(program, said, _INTERRUPTED)
    except BrokenPipeError:
        discard_stdout()
        return _BROKEN_PIPE
    except (NeoError, OSError) as error:
        wrong = unverified if isinstance(error, VerificationError) else _WRONG
        return _fail(program, wording(str(error)), wrong)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        found = f"the package {error.name} is missing" if missing else one_line(str(error))
        named = "extras" if "," in extras else "extra"
        return _fail(
            program,
            f"{found}; install neo-onnx with its {named}: pip install 'neo-onnx[{extras}]'",
            _WRONG,
        )
    return status


def discard_stdout() -> None:
    """Let stdout go nowhere: the interpreter flushes it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(program: str, message: str, status: int) -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return status
