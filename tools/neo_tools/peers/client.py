"""Client of a peer: `with Peer("openvino", model, precision="int8", threads=2) as peer: …`."""

from __future__ import annotations

from pathlib import Path

from neo_runtime.errors import RequestError

from neo_tools.peers.environments import peer_environ, python_of, spec_of
from neo_tools.peers.exports import ensure_export
from neo_tools.worker.engine_client import EngineWorker

__all__ = ["Peer"]

_START = Path(__file__).resolve().parent / "worker_start.py"


class Peer(EngineWorker):
    """A peer's worker, in the peer's environment, with a model that the peer can load.

    Args:
        name: "torch", "optimum" or "openvino".
        model: folder of a checkpoint; exported on entering the `with` block, if the peer needs that
            and it was not done before.
        precision: one of the peer's precisions; None: the first.
        threads: compute threads.
        root: folder of the peers' environments; see `environments.root_folder`.
        timeout: most seconds of one request.

    Raises:
        RequestError: `threads` is below 1.
        DependencyError: the peer does not exist; (on entering) its environment is not set up, or
            the worker does not start.
        CheckpointError, RequestError, NeoError: (on entering) as for `exports.ensure_export`.
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
            raise RequestError(f"threads is {threads}, expected at least 1")
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
