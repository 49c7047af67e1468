"""What a run found: everything that reports, pictures and tests read."""

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
    """What the machine can do at best; rates are the best of all rounds."""

    threads: int
    read: dict[str, float]
    """Bytes per second by kernel, see `bandwidth`; with "float32 decode" where a float32 bundle
    took part."""
    rounds: tuple[float, ...]
    """The best kernel's bytes per second in each measurement: before anything was loaded; then, of
    each case, before the first round and after each. On a machine that shares its memory with
    others they differ."""
    peak: dict[str, float]
    """Operations a second by element type."""
    buffer_bytes: int | None
    """Of the read measurement; None: the default for the machine."""

    @property
    def bandwidth(self) -> float:
        """The best rate of all kernels, bytes per second."""
        return max(self.read.values())

    @property
    def kernel(self) -> str:
        """Where `bandwidth` comes from."""
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
    """A bundle: `load()` to the sessions of prefill and decode ready, the files in the page cache.
    A peer: its own loading, imports of its libraries included."""
    first_load_seconds: float | None = None
    """A bundle: the same in the run's first process, before which nothing may have been in the
    page cache, nor prepacked."""
    import_seconds: float | None = None
    """A bundle: importing neo_runtime, before."""
    first_token_seconds: float | None = None
    """A bundle: from `load()` to the first token of a 16-token prompt; a new process, the files
    in the page cache."""
    first_token_prefill_seconds: float | None = None
    """The same request again in that process: what of it is prefill."""
    weights_bytes: int | None = None
    """A bundle: size of its weight file."""
    prepacked_bytes: int | None = None
    """A bundle: what is kept prepacked for it on disk, besides."""
    versions: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def first_token_excess_seconds(self) -> float | None:
        """What loading adds to the first token."""
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
    """A round each: the prefill, or all decode steps together."""
    tokens_per_second: Spread
    """Of all rows of the batch together; over the rounds."""
    first_token_seconds: float | None
    """Prefill: from token ids in to the next token known, median."""
    token_p50_seconds: float | None
    """Decode: of all steps of all rounds."""
    token_p99_seconds: float | None
    private_bytes: int | None
    """RssAnon of the process after the case; a bundle has prefill, decode and score loaded."""
    proportional_bytes: int | None
    """Pss of it."""
    cache_bytes: int | None
    """A bundle: allocated for keys and values in this case."""
    weight_bytes: int
    """Bytes of weights that a step reads, see `traffic`."""
    step_bytes: float | None
    """Decode: bytes that a step reads: weights, keys and values."""
    bytes_are_nominal: bool
    """Counted from the precision's nominal width (peers), not from the graph."""
    flops: float
    """Operations of a step, or of the whole prefill."""
    read_rate: float | None
    """Decode: step_bytes / the median round's seconds per step."""
    limit_share: float | None
    """read_rate / the machine's bandwidth, the best reading of the whole run."""
    round_limit_share: Spread | None
    """Decode: each round's rate / the best kernel's reading beside it, the larger of those right
    before and right after. What others do on the machine slows both."""
    python_seconds: float | None = None
    """Decode of a bundle: of a step, outside of onnxruntime, median."""
    generate_python_seconds: float | None = None
    """The same a token of `Model.generate`."""
    device_bytes: int | None = None
    """A bundle on a GPU: device memory taken since loading began (weights, caches, activations;
    not CUDA's own context), after the case."""

    @property
    def bytes_per_token(self) -> float | None:
        """Decode: bytes read a token; a step's bytes serve all rows of the batch."""
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
    """A finished run."""

    machine: Machine
    limits: tuple[Limits, ...]
    """One a number of threads."""
    settings: dict[str, Any]
    participants: tuple[ParticipantFacts, ...]
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]
    warnings: tuple[str, ...]

    def facts_of(self, row: Row) -> ParticipantFacts:
        """Of the participant that a row is of."""
        [facts] = [p for p in self.participants if (p.label, p.threads) == (row.label, row.threads)]
        return facts

    def to_dict(self) -> dict[str, Any]:
        """For JSON: fields as they are, and what follows from them."""
        found = {"schema": SCHEMA, **asdict(self)}
        for raw, limit in zip(found["limits"], self.limits, strict=True):
            raw |= {"bandwidth": limit.bandwidth, "kernel": limit.kernel}
        for raw, facts in zip(found["participants"], self.participants, strict=True):
            raw["first_token_excess_seconds"] = facts.first_token_excess_seconds
        for raw, row in zip(found["rows"], self.rows, strict=True):
            raw["bytes_per_token"] = row.bytes_per_token
        return found
