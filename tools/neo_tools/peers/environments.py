"""Virtual environments of the peers: `python -m neo_tools.peers setup openvino`.

For each peer, a constraints file beside this module pins versions that are known to work together.
torch is installed first, by itself: otherwise, a looser requirement of a later package could bring
a CUDA build of several gigabytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.errors import DependencyError, RequestError

from neo_tools.worker.environ import worker_environ

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "GPU_PRECISIONS",
    "PEERS",
    "PeerSpec",
    "is_ready",
    "peer_environ",
    "python_of",
    "root_folder",
    "setup",
    "spec_of",
]

GPU_PRECISIONS = ("fp16", "fp16-compiled")
"""Precisions of the torch peer on a GPU: eager, and `torch.compile`. There it runs in the caller's
environment, whose torch must be a CUDA build."""
_FOLDER = Path(__file__).resolve().parent
_MARKER = "neo-peer.json"
_TAIL_LINES = 15


@dataclass(frozen=True, kw_only=True)
class PeerSpec:
    """A peer and the contents of its environment."""

    name: str
    requirements: tuple[str, ...]
    """Requirements that pip installs after torch, with the peer's constraints."""
    probe: str
    """A statement that fails if the environment does not work."""
    worker: str
    """Name of the module in this folder that the peer's interpreter runs."""
    precisions: tuple[str, ...]
    """Precisions that the worker can load; the first is the default."""
    exports: bool
    """Whether checkpoints must be exported before the worker can load them."""
    remove: tuple[str, ...] = ()
    """Packages to uninstall at the end."""

    @property
    def constraints(self) -> Path:
        """Path of the constraints file."""
        return _FOLDER / f"constraints-{self.name}.txt"

    def check_precision(self, precision: str) -> None:
        """Raise RequestError for a precision that the worker cannot load."""
        if precision not in self.precisions:
            raise RequestError(
                f"the peer {self.name} has no precision {precision!r}, "
                f"expected one of {', '.join(self.precisions)}"
            )

    @property
    def fingerprint(self) -> str:
        """A digest that changes whenever `setup` would install something else."""
        text = repr((self.requirements, self.remove)) + self.constraints.read_text("utf-8")
        return hashlib.sha256(text.encode()).hexdigest()


PEERS: dict[str, PeerSpec] = {
    spec.name: spec
    for spec in (
        PeerSpec(
            name="torch",
            requirements=("transformers",),
            probe="from transformers import GPTNeoForCausalLM",
            worker="worker_torch",
            precisions=("fp32", "bf16"),
            exports=False,
        ),
        PeerSpec(
            name="optimum",
            requirements=("optimum-onnx[onnxruntime]",),
            probe="from optimum.onnxruntime import ORTModelForCausalLM",
            worker="worker_optimum",
            precisions=("fp32",),
            exports=True,
        ),
        PeerSpec(
            name="openvino",
            requirements=("optimum-intel", "openvino", "openvino-tokenizers", "nncf"),
            probe="import openvino; from optimum.exporters.openvino import main_export",
            worker="worker_openvino",
            precisions=("int8", "int4", "fp32"),
            exports=True,
            # optimum-intel requires it, and transformers imports it if installed. But the build
            # from the registry does not load with a CPU build of torch. Nothing here needs it.
            remove=("torchvision",),
        ),
    )
}


def root_folder(root: Path | None = None) -> Path:
    """The folder of the peers' environments and their exported models.

    Args:
        root: the folder that the user chose; None: $NEO_PEERS, else `build/peers`.
    """
    return (root or Path(os.environ.get("NEO_PEERS") or Path("build", "peers"))).absolute()


def spec_of(name: str) -> PeerSpec:
    """The peer with a name.

    Raises:
        DependencyError: no peer has that name.
    """
    if name not in PEERS:
        raise DependencyError(
            f"no peer is called {name!r}, expected one of {', '.join(sorted(PEERS))}"
        )
    return PEERS[name]


def is_ready(name: str, root: Path | None = None) -> bool:
    """Whether the peer's environment is set up and up to date."""
    try:
        python_of(name, root)
    except DependencyError:
        return False
    return True


def python_of(name: str, root: Path | None = None) -> Path:
    """Path of the peer's Python interpreter.

    Raises:
        DependencyError: no peer has that name, or its environment is not set up, or was set up with
            other versions.
    """
    spec = spec_of(name)
    folder = root_folder(root) / name
    command = _setup_command(name, root)
    marker = folder / _MARKER
    if not marker.is_file():
        raise DependencyError(f"the peer {name} has no environment in {folder}; run `{command}`")
    if _fingerprint_in(marker) != spec.fingerprint:
        raise DependencyError(
            f"the environment in {folder} was set up for other versions than those in "
            f"{spec.constraints.name}; run `{command}` again"
        )
    return _interpreter(folder)


def _fingerprint_in(marker: Path) -> str | None:
    """The fingerprint with which an environment was set up; None if the file has none."""
    try:
        found: object = json.loads(marker.read_text("utf-8"))["fingerprint"]
    except (ValueError, KeyError, TypeError):  # incomplete, or of another program
        return None
    return found if isinstance(found, str) else None


def setup(name: str, root: Path | None = None) -> Path:
    """Create, complete or update the peer's environment, unless it is up to date.

    The first time takes minutes and one to two gigabytes. Progress goes to stderr.

    Returns:
        Path of the peer's Python interpreter.

    Raises:
        DependencyError: no peer has that name, or a step failed; the message then ends with the
            last lines of its output.
    """
    spec = spec_of(name)
    if is_ready(name, root):
        return python_of(name, root)
    folder = root_folder(root) / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    python = _interpreter(folder)
    if not python.exists():
        _run((sys.executable, "-m", "venv", str(folder)), f"create {folder}")
    pip = (str(python), "-m", "pip", "--disable-pip-version-check")
    install = (*pip, "install", "--quiet", "--constraint", str(spec.constraints))
    _run((*install, "torch"), f"install torch for {name}")
    _run((*install, "torch", *spec.requirements), f"install {', '.join(spec.requirements)}")
    if spec.remove:
        _run((*pip, "uninstall", "--quiet", "--yes", *spec.remove), f"remove {spec.remove[0]}")
    _run((str(python), "-c", spec.probe), f"try out {name}")
    marker = {"fingerprint": spec.fingerprint}
    (folder / _MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")
    return python


def peer_environ(threads: int | None = None) -> dict[str, str]:
    """`worker_environ` without the variables that configure this process's own interpreter."""
    return {
        name: value
        for name, value in worker_environ(threads).items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONWARNINGS")
    }


def _interpreter(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _setup_command(name: str, root: Path | None) -> str:
    command = f"python -m neo_tools.peers setup {name}"
    return command if root is None else f"{command} --root {root}"


def _run(command: Sequence[str], what: str) -> None:
    """Run one step; its output goes to stderr."""
    print(f"{what} …", file=sys.stderr, flush=True)
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    environ = {"ORT_DISABLE_TELEMETRY": "1", **os.environ, "PYTHONWARNINGS": "ignore"}
    environ.pop("PYTHONPATH", None)  # the probe is to find the environment's own packages
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                tail.append(line.rstrip())
                print(f"  {line.rstrip()}", file=sys.stderr, flush=True)
        except BaseException:  # mostly Ctrl-C: the step must not go on without us
            process.kill()
            raise
    if process.returncode:
        raise DependencyError(
            f"could not {what}: `{' '.join(command)}` ended with status {process.returncode}; "
            "its last lines:\n" + "\n".join(tail)
        )
