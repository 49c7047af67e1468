"""Run a command: its exit status and, on an error, one line on stderr.

Imports nothing heavy, so that `--help` and usage errors respond at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from neo_runtime.command.standard_streams import prepare_streams
from neo_runtime.errors import NeoError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OneLineParser", "add_version", "discard_stdout", "one_line", "run_command"]

_NO_ROOM = (errno.ENOSPC, errno.EFBIG)
_WRONG, _INTERRUPTED, _BROKEN_PIPE = 2, 130, 141


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports usage errors in one line, without the long usage text.

    Descriptions keep their line breaks, and options cannot be abbreviated.
    """

    def __init__(self, **options: Any) -> None:
        kept: dict[str, Any] = {
            "formatter_class": argparse.RawDescriptionHelpFormatter,
            "allow_abbrev": False,
        }
        super().__init__(**kept | options)

    def error(self, message: str) -> NoReturn:
        """Print the message in one line and exit."""
        self.exit(_WRONG, f"{self.prog}: {message}; see {self.prog} --help\n")


class _ShowVersion(argparse.Action):
    """Looks up the version only when it is requested."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        from importlib.metadata import version

        print(f"{parser.prog} {version('neo-onnx')}")
        parser.exit()


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add `--version`."""
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")


def one_line(message: str) -> str:
    """Join the lines of a message; spaces within a line are kept, as a path may contain them."""
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
    """Run the work of a command, and turn errors into messages and exit statuses.

    Args:
        program: name of the command, with which lines on stderr begin.
        work: returns the exit status. It closes its progress line on stderr however it ends.
        extras: the package's extras (comma-separated) that install what the command imports, in
            their CPU variants unless a GPU was requested.
        interrupted: message for Ctrl-C; None for no message. If it depends on how far the work
            got, the work raises a KeyboardInterrupt with the message.
        unverified: exit status for a `VerificationError`.
        wording: turns an error's message into one line.

    Returns:
        The status of `work`; 2 for an error, 130 after Ctrl-C, 141 if the reader of stdout
        has closed the pipe. An unexpected exception is raised with its traceback.
    """
    prepare_streams()
    try:
        status = work()
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        said = str(stop) or interrupted
        return _INTERRUPTED if said is None else _fail(program, said, _INTERRUPTED)
    except BrokenPipeError:
        discard_stdout()
        return _BROKEN_PIPE
    except NeoError as error:
        _give_up_full_stdout()
        wrong = unverified if isinstance(error, VerificationError) else _WRONG
        return _fail(program, wording(str(error)), wrong)
    except OSError as error:
        _give_up_full_stdout()
        return _fail(program, one_line(_words_of(error)), _WRONG)
    except ImportError as error:
        return _fail(program, _what_is_missing(error, extras), _WRONG)
    return status


def _what_is_missing(error: ImportError, extras: str) -> str:
    from neo_runtime.machine.installation import install_command

    missing = isinstance(error, ModuleNotFoundError)
    if missing and error.name in sys.stdlib_module_names:
        return (
            f"this Python has no module {error.name}, which it has on Linux and macOS; on Windows "
            "use the Windows Subsystem for Linux"
        )
    found = f"the package {error.name} is missing" if missing else one_line(str(error))
    named = "extras" if "," in extras else "extra"
    return f"{found}; install neo-onnx with its {named}: {install_command(extras)}"


def _give_up_full_stdout() -> None:
    """Discard unwritable output: the interpreter would flush it at exit, and set its own status."""
    try:
        sys.stdout.flush()
    except OSError:
        discard_stdout()


def _words_of(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    if error.filename is not None:
        return f"{error.filename} cannot be used: {error.strerror}"
    if error.errno in _NO_ROOM:  # files are named by who writes them
        return f"cannot write to standard output: {error.strerror}"
    return error.strerror


def discard_stdout() -> None:
    """Redirect stdout to the null device: at exit the interpreter flushes it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(program: str, message: str, status: int) -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return status
