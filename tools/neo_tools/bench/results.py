"""The results of a run, for reports, plots and tests."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from neo_tools.bench.machine import Machine
    from neo_tools.bench.spread import Spread

__all__ = ["SCHEMA", "Limits", "ParticipantFacts", "Ratio", "Results", "Row"]

SCHEMA = "neo-bench/1"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of the machine; rates are the best of all rounds."""

    threads: int
    read: dict[str, float]
    """Bytes per second by kernel, see `bandwidth`; includes "float32 decode" if a float32 bundle
    takes part."""
    rounds: tuple[float, ...]
    """The best kernel's bytes per second in each measurement: one before anything is loaded, and
    for each case one before the first round and one after each round. They differ on a machine that
    shares its memory with others."""
    peak: dict[str, float]
    """Operations per second by element type."""
    buffer_bytes: int | None
    """Buffer of the read measurement; None for the machine's default."""

    @property
    def bandwidth(self) -> float:
        """The best rate of all kernels, bytes per second."""
        return max(self.read.values())

    @property
    def kernel(self) -> str:
        """Name of the kernel with the rate `bandwidth`."""
        return max(self.read, key=lambda name: self.read[name])


@dataclass(frozen=True, kw_only=True)
class ParticipantFacts:
    """One participant with one number of threads."""

    label: str
    kind: Literal["bundle", "peer"]
    precision: str
    threads: int
    source: str
    """The bundle or the checkpoint."""
    load_seconds: float
    """Bundles: from `load()` until the sessions of prefill and decode are ready, with the files in
    the page cache. Peers: their own loading, imports of their libraries included."""
    first_load_seconds: float | None = None
    """Bundles: the same in the run's first process, where the files may not be in the page cache,
    nor prepacked yet."""
    import_seconds: float | None = None
    """Bundles: importing neo_runtime, before loading."""
    first_token_seconds: float | None = None
    """Bundles: from `load()` to the first token of a 16-token prompt, in a new process with the
    files in the page cache."""
    first_token_prefill_seconds: float | None = None
    """The same request again in that process: prefill's part of `first_token_seconds`."""
    weights_bytes: int | None = None
    """Bundles: size of the weight file."""
    prepacked_bytes: int | None = None
    """Bundles: size of the prepacked weights on disk, which come in addition."""
    versions: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def first_token_excess_seconds(self) -> float | None:
        """Time that loading adds to the first token."""
        if self.first_token_seconds is None or self.first_token_prefill_seconds is None:
            return None
        return self.first_token_seconds - self.first_token_prefill_seconds


@dataclass(frozen=True, kw_only=True)
class Row:
    """One participant in one case."""

    label: str
    kind: Literal["bundle", "peer"]
    precision: str
    test: str
    threads: int
    batch: int
    prompt: int
    new_tokens: int
    depth: int
    round_seconds: tuple[float, ...]
    """One entry per round: the prefill, or all decode steps together."""
    tokens_per_second: Spread
    """Rate of all rows of the batch together; spread over the rounds."""
    first_token_seconds: float | None
    """Prefill: from the token ids to the next token, median."""
    token_p50_seconds: float | None
    """Decode: median over all steps of all rounds."""
    token_p99_seconds: float | None
    private_bytes: int | None
    """RssAnon of the process after the case; a bundle has prefill, decode and score loaded."""
    proportional_bytes: int | None
    """Pss of the process after the case."""
    cache_bytes: int | None
    """Bundles: bytes allocated for keys and values in this case."""
    weight_bytes: int
    """Bytes of weights that a step reads, see `traffic`."""
    step_bytes: float | None
    """Decode: bytes that a step reads: weights, keys and values."""
    bytes_are_nominal: bool
    """Whether bytes are computed from the precision's nominal width (peers), not from the graph."""
    flops: float
    """Operations of a step, or of the whole prefill."""
    read_rate: float | None
    """Decode: step_bytes / the median round's seconds per step."""
    limit_share: float | None
    """read_rate / the machine's bandwidth, which is the best measurement of the whole run."""
    round_limit_share: Spread | None
    """Decode: each round's rate / the machine's bandwidth at that time: the larger of the
    measurements right before and right after the round. Other programs slow both alike."""
    python_seconds: float | None = None
    """Decode of a bundle: time of a step outside of onnxruntime, median."""
    generate_python_seconds: float | None = None
    """The same per token of `Model.generate`."""
    device_bytes: int | None = None
    """Bundles on a GPU: device memory after the case that was allocated since loading began
    (weights, caches, activations; not CUDA's own context)."""

    @property
    def bytes_per_token(self) -> float | None:
        """Decode: bytes read per token; a step's bytes serve all rows of the batch."""
        return None if self.step_bytes is None else self.step_bytes / self.batch


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One participant against a bundle in one case: its time / the bundle's time."""

    test: str
    threads: int
    batch: int
    other: str
    bundle: str
    rounds: tuple[float, ...]
    spread: Spread


@dataclass(frozen=True, kw_only=True)
class Results:
    """The results of a finished run."""

    machine: Machine
    limits: tuple[Limits, ...]
    """One entry per number of threads."""
    settings: dict[str, Any]
    participants: tuple[ParticipantFacts, ...]
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]
    warnings: tuple[str, ...]

    def facts_of(self, row: Row) -> ParticipantFacts:
        """The facts of a row's participant."""
        [facts] = [p for p in self.participants if (p.label, p.threads) == (row.label, row.threads)]
        return facts

    def to_dict(self) -> dict[str, Any]:
        """The fields, and values that are derived from them, for JSON."""
        found = {"schema": SCHEMA, **asdict(self)}
        for raw, limit in zip(found["limits"], self.limits, strict=True):
            raw |= {"bandwidth": limit.bandwidth, "kernel": limit.kernel}
        for raw, facts in zip(found["participants"], self.participants, strict=True):
            raw["first_token_excess_seconds"] = facts.first_token_excess_seconds
        for raw, row in zip(found["rows"], self.rows, strict=True):
            raw["bytes_per_token"] = row.bytes_per_token
        return found
