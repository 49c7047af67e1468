"""The cases to measure: combinations of prompt or depth, new tokens, batch and threads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

from neo_runtime.errors import ContextLengthError, RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = [
    "Case",
    "PeerChoice",
    "Settings",
    "check_lengths",
    "make_cases",
    "positions_needed",
    "threads_text",
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One test to time, the same for every participant."""

    kind: Literal["prefill", "decode"]
    threads: int
    batch: int
    prompt: int = 0
    """Prefill: tokens per row, into an empty cache, in one call."""
    new_tokens: int = 0
    """Decode: greedy steps, one after another."""
    depth: int = 0
    """Decode: positions in the cache before the first step."""

    @property
    def name(self) -> str:
        """The name in llama-bench's notation: "pp128" or "tg32 @ d128"."""
        if self.kind == "prefill":
            return f"pp{self.prompt}"
        return f"tg{self.new_tokens} @ d{self.depth}"

    @property
    def title(self) -> str:
        """The name with everything that distinguishes this case from others."""
        return f"{self.name}, batch {self.batch}, {threads_text(self.threads)}"

    @property
    def tokens(self) -> int:
        """Tokens that pass through the model in one round, all rows together."""
        return self.batch * (self.prompt or self.new_tokens)


@dataclass(frozen=True, kw_only=True)
class PeerChoice:
    """A peer on the command line: `openvino:int4`."""

    name: str
    precision: str

    @property
    def label(self) -> str:
        """The peer's name in reports."""
        return f"{self.name}:{self.precision}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run."""

    bundles: tuple[Path, ...]
    peers: tuple[PeerChoice, ...] = ()
    model: Path | None = None
    """The checkpoint that the peers load."""
    peers_root: Path | None = None
    prompts: tuple[int, ...] = (128,)
    new_tokens: tuple[int, ...] = (32,)
    depths: tuple[int, ...] = (128,)
    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)
    repetitions: int = 5
    """Rounds per case; in each, every participant has one turn."""
    seed: int = 1
    """Seed of the token ids, see `neo_tools.worker.engine.context_ids`."""
    warmup: bool = True
    """Whether each participant has a first turn that does not count."""
    keep_context: bool = False
    """Decode continues the previous round instead of filling the cache again."""
    prefill_chunk: int | None = None
    """Chunk size of prefill in our runtime; None for its default."""
    keep_prepacked: bool = False
    """Whether our runtime also keeps the prepacked weights of float32."""
    probe_bytes: int | None = None
    """Buffer of the bandwidth measurement; None for `bandwidth.default_buffer_bytes`."""
    backend: str = "auto"
    """Backend of the bundles, as in `neo_runtime.load`."""
    device: int = 0
    """Number of the GPU."""
    timeout: float = 3600.0
    """Longest time for one answer of a participant, in seconds."""
    cases: tuple[Case, ...] = ()

    @property
    def on_gpu(self) -> bool:
        """Whether the run is on a GPU; then the GPU's limits are measured."""
        return self.backend in ("cuda", "tensorrt")


def threads_text(threads: int) -> str:
    """Text for reports, such as "2 threads"."""
    return f"{threads} thread{'' if threads == 1 else 's'}"


def make_cases(
    *,
    prompts: Sequence[int],
    new_tokens: Sequence[int],
    depths: Sequence[int],
    batches: Sequence[int],
    threads: Sequence[int],
) -> tuple[Case, ...]:
    """Every combination: threads × batch × (each prompt; each depth × new tokens).

    A prompt of 0 or 0 new tokens means that there is nothing to measure, as in llama-bench.

    Raises:
        RequestError: nothing is left to measure.
    """
    cases: list[Case] = []
    for thread_count, batch in product(threads, batches):
        shared = {"threads": thread_count, "batch": batch}
        cases += [Case(kind="prefill", prompt=p, **shared) for p in prompts if p]
        cases += [
            Case(kind="decode", new_tokens=n, depth=depth, **shared)
            for depth, n in product(depths, new_tokens)
            if n
        ]
    if not cases:
        raise RequestError("nothing to measure: -p and -n are both 0; give one of them a number")
    return tuple(cases)


def positions_needed(case: Case, repetitions: int, *, keep_context: bool) -> int:
    """Positions that a cache needs for this case."""
    if case.kind == "prefill":
        return case.prompt
    return case.depth + case.new_tokens * (repetitions if keep_context else 1)


def check_lengths(settings: Settings, max_length: int, name: str) -> None:
    """Refuse cases that need more positions than a model has, before anything is started.

    Raises:
        ContextLengthError: a case needs more than `max_length` positions.
    """
    for case in settings.cases:
        needed = positions_needed(case, settings.repetitions, keep_context=settings.keep_context)
        if needed > max_length:
            advice = "leave --keep-context out, or give" if settings.keep_context else "give"
            raise ContextLengthError(
                f"{case.name} needs {needed} positions, but {name} has {max_length}; "
                f"{advice} smaller numbers"
            )
