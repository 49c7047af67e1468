"""The processes that a run starts, and their options."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from neo_tools.bench.participants import BandwidthWorker, NeoWorker, Participant
from neo_tools.peers.client import Peer
from neo_tools.worker.engine_client import EngineWorker
from neo_tools.worker.environ import worker_environ

if TYPE_CHECKING:
    from neo_tools.bench.cases import PeerChoice, Settings
    from neo_tools.bench.opening import BundleInfo
    from neo_tools.bench.participants import Guard

__all__ = ["bandwidth_participant", "gpu_command", "make_participants", "neo_worker"]


def bandwidth_participant(settings: Settings, threads: int, guard: Guard) -> Participant:
    """The participant that measures the machine: on a GPU run, the GPU's memory."""
    worker = BandwidthWorker(
        threads=threads,
        size=settings.probe_bytes,
        timeout=settings.timeout,
        device=settings.device if settings.on_gpu else None,
    )
    return Participant(label="machine", kind="machine", worker=worker, guard=guard)


def make_participants(
    settings: Settings, bundles: list[BundleInfo], threads: int, guard: Guard
) -> list[Participant]:
    """The bundles and the peers, not started yet."""
    found = [
        Participant(
            label=info.label,
            kind="bundle",
            precision=info.manifest.precision,
            worker=neo_worker(settings, info, threads),
            guard=guard,
        )
        for info in bundles
    ]
    found += [
        Participant(
            label=choice.label,
            kind="peer",
            precision=choice.precision,
            worker=_peer_worker(settings, choice, threads),
            guard=guard,
        )
        for choice in settings.peers
    ]
    return found


def _peer_worker(settings: Settings, choice: PeerChoice, threads: int) -> EngineWorker:
    assert settings.model is not None
    if settings.on_gpu:
        return EngineWorker(
            gpu_command(settings, choice, threads),
            title=f"the peer {choice.name}",
            environ=worker_environ(threads),
            timeout=settings.timeout,
        )
    return Peer(
        choice.name,
        settings.model,
        precision=choice.precision,
        threads=threads,
        root=settings.peers_root,
        timeout=settings.timeout,
    )


def gpu_command(settings: Settings, choice: PeerChoice, threads: int) -> list[str]:
    """The command of the torch peer on the same GPU, in this environment."""
    command = [sys.executable, "-m", "neo_tools.peers.worker_torch", "--model", str(settings.model)]
    command += ["--precision", choice.precision, "--threads", str(threads)]
    return [*command, "--device", f"cuda:{settings.device}"]


def neo_worker(settings: Settings, info: BundleInfo, threads: int) -> NeoWorker:
    """A bundle's process, not started yet."""
    return NeoWorker(
        info.label,
        info.path,
        threads=threads,
        prefill_chunk=settings.prefill_chunk,
        backend=settings.backend,
        device=settings.device,
        keep_prepacked=settings.keep_prepacked,
        timeout=settings.timeout,
    )
