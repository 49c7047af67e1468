"""Perplexity, intervals and summaries against plain computations."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.bench_samples import model_spec
from neo_export.comparison import metrics
from neo_export.tolerances import QUALITY
from neo_tools.diff.position_metrics import compare_rows, joined, perplexity, summaries
from neo_tools.diff.report import interval_text
from neo_tools.diff.results import GraphSummary
from neo_tools.diff.thresholds import Limits, checks


def rows(n: int = 96, noise: float = 0.3, seed: int = 0) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, 50, n)
    reference = generator.normal(0, 3, (n, 50)).astype(np.float32)
    found = reference + generator.normal(0, noise, reference.shape).astype(np.float32)
    return ids, found, reference


def test_error_statistics() -> None:
    _, found, reference = rows()
    statistics = metrics.error_statistics(found, reference)
    absolute = np.abs(found - reference)
    relative = absolute / np.abs(reference)
    for name, values in (("absolute", absolute), ("relative", relative)):
        assert statistics[f"{name}_max"] == pytest.approx(values.max(axis=1))
        assert statistics[f"{name}_mean"] == pytest.approx(values.mean(axis=1))
        assert statistics[f"{name}_median"] == pytest.approx(np.sort(values, axis=1)[:, 24])
        assert statistics[f"{name}_p99"] == pytest.approx(np.sort(values, axis=1)[:, 49])


def test_positions_of_two_texts() -> None:
    """The last position of each text predicts nothing that is known."""
    parts = []
    for context in range(2):
        ids, found, reference = rows(seed=context)
        parts.append(compare_rows(context, ids, np.arange(96), found, reference))
    both = joined(parts)
    assert np.flatnonzero(np.isnan(both.nll_bundle)).tolist() == [95, 191]
    ids, found, reference = rows(seed=1)
    assert both.nll_bundle[96:191] == pytest.approx(metrics.cross_entropy(found[:-1], ids[1:]))
    assert both.kl[96:] == pytest.approx(metrics.kl_divergence(reference, found))
    by_region = {part.region: part for part in summaries("score", both, window=64)}
    assert [part.positions for part in by_region.values()] == [192, 126, 2, 64]
    assert by_region["past"].kl_max == pytest.approx(max(both.kl[64:96].max(), both.kl[160:].max()))


def test_what_the_order_of_sums_decides_is_no_disagreement() -> None:
    ids, _, reference = rows()
    reference[:, 7] = np.delete(reference, 7, axis=1).max(axis=1)
    largest = np.abs(reference).max(axis=1)
    reference[:, 7] -= np.float32(3e-6) * largest
    found = reference.copy()
    found[:, 7] += np.float32(6e-6) * largest
    assert (found.argmax(axis=1) != reference.argmax(axis=1)).all()
    assert compare_rows(0, ids, np.arange(96), found, reference).top_1.all()
    apart = reference.copy()
    apart[:, 7] += np.float32(1e-4) * np.abs(reference).max(axis=1)
    assert not compare_rows(0, ids, np.arange(96), reference, apart).top_1.all()


def test_perplexity_and_its_interval() -> None:
    """Against the definition, and the interval against the normal one of block means."""
    ids, found, reference = rows(n=3201, noise=0.2)
    result = perplexity(compare_rows(0, ids, np.arange(3201), found, reference))
    targets = ids[1:]
    nll = [metrics.cross_entropy(x[:-1], targets) for x in (reference, found)]
    assert result.tokens == 3200
    assert result.reference == pytest.approx(np.exp(nll[0].mean()))
    assert result.bundle == pytest.approx(np.exp(nll[1].mean()))
    assert result.increase == pytest.approx(result.bundle / result.reference - 1)
    blocks = (nll[1] - nll[0]).reshape(100, 32).mean(axis=1)
    error = blocks.std(ddof=1) / 10
    assert result.low is not None
    assert result.high is not None
    assert np.log1p(result.low) == pytest.approx(blocks.mean() - 1.96 * error, abs=0.2 * error)
    assert np.log1p(result.high) == pytest.approx(blocks.mean() + 1.96 * error, abs=0.2 * error)


def summary(**changes: float) -> GraphSummary:
    values = {
        "kl_mean": 0.01,
        "kl_median": 0.01,
        "kl_p99": 0.1,
        "kl_max": 0.2,
        "top_1": 0.95,
        "top_5": 0.9,
        "logit_error_median": 0.02,
        "logit_error_max": 0.1,
    }
    return GraphSummary(
        graph="score", region="all", positions=100, absolute={}, relative={}, **values | changes
    )


@pytest.mark.parametrize(
    ("limits", "changes", "past"),
    [
        (Limits(), {}, set()),
        (Limits(max_kl=0.005), {}, {"mean KL"}),
        (Limits(max_kl=0.01), {}, set()),
        (Limits(min_top_1=0.96), {}, {"top-1 agreement"}),
        (Limits(max_logit_error=0.01), {}, {"logit error"}),
        (Limits(max_perplexity_increase=-1.0), {}, {"perplexity increase"}),
        (Limits(), {"kl_mean": float("nan")}, {"mean KL"}),
        (Limits(), {"top_1": 0.1}, {"top-1 agreement"}),
        (Limits(), {"logit_error_median": float("nan")}, {"logit error"}),
    ],
)
def test_limits(limits: Limits, changes: dict[str, float], past: set[str]) -> None:
    ids, found, reference = rows(noise=1e-4)
    whole = perplexity(compare_rows(0, ids, np.arange(96), found, reference))
    judged = checks(limits, QUALITY["int8"], [summary(**changes)], whole, [])
    assert {check.name for check in judged if not check.passed} == past


def test_every_limit_says_what_it_is_of() -> None:
    ids, found, reference = rows(noise=1e-4)
    whole = perplexity(compare_rows(0, ids, np.arange(96), found, reference))
    worse = {"logit_error_median": 2.0, "top_1": 0.0, "graph": "decode", "positions": 7}
    decode = GraphSummary(**vars(summary()) | worse)
    judged = checks(Limits(min_top_1=0.5), QUALITY["int8"], [summary(), decode], whole, [])
    assert [(c.name, c.option, c.at_most, c.graph, c.positions) for c in judged] == [
        ("mean KL", "--max-kl", True, "score", 100),
        ("top-1 agreement", "--min-top1", False, "score", 100),
        ("perplexity increase", "--max-ppl-increase", True, None, None),
        ("logit error", "--max-logit-error", True, "decode", 7),
        ("faults", "", True, None, None),
    ]
    assert judged[1].limit == 0.5


def test_a_worse_graph_counts() -> None:
    ids, found, reference = rows(noise=1e-4)
    whole = perplexity(compare_rows(0, ids, np.arange(96), found, reference))
    decode = GraphSummary(**vars(summary(kl_mean=1.0)) | {"graph": "decode"})
    judged = checks(Limits(), QUALITY["int8"], [summary(), decode], whole, [])
    [past] = [check for check in judged if not check.passed]
    assert (past.name, past.graph, past.positions) == ("mean KL", "decode", 100)


def test_nothing_is_said_of_unknown_shapes() -> None:
    from neo_runtime.errors import RequestError
    from neo_tools.diff.references import require_same_shape

    one = model_spec()
    assert require_same_shape(one, one) == []
    with pytest.raises(RequestError, match=r"num_layers 2 against 3.*give the checkpoint"):
        require_same_shape(one, model_spec(num_layers=3))
    [warning] = require_same_shape(one, model_spec(window_size=5))
    assert "window_size 4 against 5" in warning


def test_few_tokens_have_no_interval() -> None:
    """What the interval of a few blocks holds is far from 95 %; from 16 on it is near."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        interval = metrics.bootstrap_interval(rng.normal(size=16 * 32))
        assert interval is not None
        held += interval[0] <= 0 <= interval[1]
    assert held / 400 > 0.88
    assert metrics.bootstrap_interval(rng.normal(size=15 * 32)) is None
    ids, found, reference = rows(n=200, noise=0.2)
    result = perplexity(compare_rows(0, ids, np.arange(200), found, reference))
    assert (result.low, result.high) == (None, None)
    assert interval_text(result) == "too few for an interval"
