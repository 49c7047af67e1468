"""What a comparison found, as plain data: the terminal, JSON and the page use only this."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neo_export.comparison.faults import Fault

__all__ = [
    "Check",
    "Continuation",
    "GraphSummary",
    "Perplexity",
    "PlaceSummary",
    "Results",
    "Subject",
    "TokenError",
]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Subject:
    """A bundle, or a reference."""

    path: str
    kind: str
    """"bundle", or "PyTorch" (transformers' GPT-Neo, eager, float32)."""
    precision: str
    target: str | None = None
    digest: str | None = None
    backend: str | None = None
    """What ran a bundle: "cpu", "cuda" or "tensorrt"."""
    runs_on: str | None = None
    """The same for the reader: "CPU", a GPU's name, a plan on one."""


@dataclass(frozen=True)
class GraphSummary:
    """Logits of one graph over all positions that were compared, or those of one region."""

    graph: str
    region: str
    """"all", "below", "at" or "past" the window."""
    positions: int
    kl_mean: float
    """KL(reference ‖ bundle), nats."""
    kl_median: float
    kl_p99: float
    kl_max: float
    top_1: float
    """Share of positions whose best token is the same."""
    top_5: float
    """Mean share of the reference's best five that are among the bundle's."""
    logit_error_median: float
    """Relative L2 of a position's logits: the median."""
    logit_error_max: float
    absolute: dict[str, float]
    """max, mean, median, p99 of |logit − reference|: of each position over the vocabulary; here
    the largest maximum, and the medians over positions of the others."""
    relative: dict[str, float]
    """The same of |logit − reference| / |reference|."""


@dataclass(frozen=True)
class Perplexity:
    """Of the score graph, over every token but the first of each context."""

    tokens: int
    reference: float
    bundle: float
    increase: float
    """bundle / reference − 1."""
    low: float | None
    high: float | None
    """95 % confidence interval of `increase`: see `perplexity`. None: too few tokens for one."""


@dataclass(frozen=True)
class PlaceSummary:
    """Hidden states at one place, in one region. Relative L2 of positions."""

    graph: str
    layer: int | None
    place: str
    region: str
    positions: int
    local_median: float
    """Of this step itself, from the bundle's own inputs; the accumulated one where the reference is
    a bundle."""
    local_max: float
    cumulative_median: float
    """Against the reference's own run."""
    cumulative_max: float


@dataclass(frozen=True)
class Continuation:
    """Where greedy texts part."""

    context: int
    prompt_tokens: int
    tokens: int
    """How many were written."""
    parted_after: int | None
    """Equal tokens before the first that differs; None where none does."""
    bundle_text: str
    reference_token: str | None
    """What the reference would have written there."""


@dataclass(frozen=True)
class TokenError:
    """A position that is affected much, in its text."""

    context: int
    position: int
    before: str
    token: str
    after: str
    kl: float
    reference_best: str
    bundle_best: str


@dataclass(frozen=True, kw_only=True)
class Check:
    """One limit."""

    name: str
    option: str
    found: float
    limit: float
    at_most: bool
    passed: bool
    meaning: str
    graph: str | None = None
    """Whose logits it was found in; None: it is not of one graph."""
    positions: int | None = None
    """Of that graph, that were looked at."""


@dataclass(frozen=True)
class Results:
    """All of it."""

    bundle: Subject
    reference: Subject
    text: str
    contexts: tuple[int, ...]
    """Tokens of each."""
    window_size: int
    attention_layers: tuple[str, ...]
    settings: dict[str, Any]
    graphs: tuple[GraphSummary, ...]
    perplexity: Perplexity
    continuations: tuple[Continuation, ...]
    localized_tokens: int
    places: tuple[PlaceSummary, ...]
    first_fault: Fault | None
    faults: tuple[Fault, ...]
    checks: tuple[Check, ...]
    passed: bool
    worst_tokens: tuple[TokenError, ...]
    positions: dict[str, list[Any]]
    """One entry a scored position: context, position, token, kl, top_1, top_5, nll_reference,
    nll_bundle (null at a context's last position: what follows is unknown), logit_error, and
    absolute_ and relative_ max, mean, median and p99 over the vocabulary."""
    kl_histogram: dict[str, list[float]]
    """`edges` [n + 1], in nats, the first bin beginning at 0, and `counts` [n]."""
    warnings: tuple[str, ...]
    seconds: float
    peak_rss_bytes: int
    peak_private_bytes: int
    versions: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        return asdict(self)
