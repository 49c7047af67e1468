"""The results of a comparison as plain data; the terminal, JSON and the page use only these."""

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
    """The bundle or the reference of a comparison."""

    path: str
    kind: str
    """"bundle", or "PyTorch" (transformers' GPT-Neo, eager, float32)."""
    precision: str
    target: str | None = None
    digest: str | None = None
    backend: str | None = None
    """Backend of a bundle: "cpu", "cuda" or "tensorrt"."""
    runs_on: str | None = None
    """Its description for reports: "CPU", a GPU's name, a plan on a GPU."""


@dataclass(frozen=True)
class GraphSummary:
    """Errors of one graph's logits over all compared positions, or over those of one region."""

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
    """Median over positions of the relative L2 error of the logits."""
    logit_error_max: float
    absolute: dict[str, float]
    """max, mean, median and p99 of |logit − reference| over the vocabulary; summarized over
    positions by the largest maximum, and by the median for the others."""
    relative: dict[str, float]
    """The same of |logit − reference| / |reference|."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity with the score graph, over every token but the first of each context."""

    tokens: int
    reference: float
    bundle: float
    increase: float
    """bundle / reference − 1."""
    low: float | None
    high: float | None
    """`low` to `high` is the 95 % confidence interval of `increase` (see `perplexity`); both are
    None if there are too few tokens."""


@dataclass(frozen=True)
class PlaceSummary:
    """Relative L2 errors of the hidden states at one place, in one region."""

    graph: str
    layer: int | None
    place: str
    region: str
    positions: int
    local_median: float
    """Local error of this step, computed from the bundle's own inputs; the accumulated error if the
    reference is a bundle."""
    local_max: float
    cumulative_median: float
    """Accumulated error, against the reference's own run."""
    cumulative_max: float


@dataclass(frozen=True)
class Continuation:
    """Where the greedy texts of bundle and reference diverge."""

    context: int
    prompt_tokens: int
    tokens: int
    """Number of generated tokens."""
    parted_after: int | None
    """Number of equal tokens before the first difference; None if all are equal."""
    bundle_text: str
    reference_token: str | None
    """The reference's token there."""


@dataclass(frozen=True)
class TokenError:
    """A position with a large error, in its text."""

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
    """One limit, and whether it is kept."""

    name: str
    option: str
    found: float
    limit: float
    at_most: bool
    passed: bool
    meaning: str
    graph: str | None = None
    """The graph whose logits it is about; None if it is not about one graph."""
    positions: int | None = None
    """Number of compared positions of that graph."""


@dataclass(frozen=True)
class Results:
    """All results of a comparison."""

    bundle: Subject
    reference: Subject
    text: str
    contexts: tuple[int, ...]
    """Number of tokens of each context."""
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
    """Columns with one entry per scored position: context, position, token, kl, top_1, top_5,
    nll_reference, nll_bundle (null at a context's last position, which has no next token),
    logit_error, and absolute_ and relative_ max, mean, median and p99 over the vocabulary."""
    kl_histogram: dict[str, list[float]]
    """`edges` [n + 1] in nats, where the first bin includes 0, and `counts` [n]."""
    warnings: tuple[str, ...]
    seconds: float
    peak_rss_bytes: int
    peak_private_bytes: int
    versions: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """The results as a dictionary for `json.dumps`."""
        return asdict(self)
