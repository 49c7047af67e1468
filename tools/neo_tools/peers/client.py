"""Talk to a peer: `with Peer("openvino", model, precision="int8", threads=2) as peer: …`."""

from __future__ import annotations

from pathlib import Path

from neo_runtime.errors import RequestError

from neo_tools.peers.environments import peer_environ, python_of, spec_of
from neo_tools.peers.exports import ensure_export
from neo_tools.worker.engine_client import EngineWorker

__all__ = ["Peer"]

_START = Path(__file__).resolve().parent / "worker_start.py"


class Peer(EngineWorker):
    """A peer's process, in its own environment, on its own export.

    Args:
        name: "torch", "optimum" or "openvino".
        model: a checkpoint's folder; exported (once, on entering) where the peer needs it.
        precision: one of the peer's; its first if None.
        threads: that the peer may compute with.
        root: where the peers live; see `environments.root_folder`.
        timeout: seconds that one request may take.

    Raises:
        RequestError: no threads.
        DependencyError: there is no such peer; on entering, its environment is not set up, or the
            worker does not start.
        CheckpointError, RequestError, NeoError: (on entering) see `exports.ensure_export`.
    """

    def __init__(
        self,
        name: str,
        model: Path,
        *,
        precision: str | None = None,
        threads: int = 1,
        root: Path | None = None,
        timeout: float = 600.0,
    ) -> None:
        if threads < 1:
            raise RequestError(f"threads is {threads}; expected 1 or more")
        spec = spec_of(name)
        chosen = precision or spec.precisions[0]

        def command() -> list[str]:
            python = python_of(name, root)
            folder = ensure_export(name, model, chosen, root)
            options = {"--model": folder, "--precision": chosen, "--threads": threads}
            pairs = [str(part) for option in options.items() for part in option]
            return [str(python), str(_START), spec.worker, *pairs]

        super().__init__(
            command,
            title=f"the peer {name}",
            environ=peer_environ(threads),
            timeout=timeout,
            advice=f"run `python -m neo_tools.peers setup {name}` again",
        )
