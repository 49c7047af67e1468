"""Statistics of the demo model equal those of the whole PyTorch model's own activations."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.held_out import held_out_ids
from helpers.models import DEMO, Reference
from neo_calibration.cli import main
from neo_calibration.likely import LIKELY
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.comparison.metrics import log_softmax
from neo_export.gpt_neo.parameters import input_place
from neo_export.statistics.folder import Statistics
from neo_export.statistics.header import INPUT_PLACES, MEASURED_PLACES
from neo_runtime.errors import StatisticsError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LENGTH = 512
CONTEXTS = 3
TOKENS = 2 * LENGTH + 100
"""Two full contexts and a short one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("statistics") / "stats"
    command = [str(DEMO), "--text", str(DEMO / "heldout.jsonl"), "-o", str(output)]
    assert main([*command, "--tokens", str(TOKENS)]) == 0
    return output


@pytest.fixture(scope="module")
def activations(reference: Reference) -> dict[str, NDArray[np.float64]]:
    """Every place of the whole model at once, [TOKENS, C], by PyTorch's own hooks."""
    seen: dict[str, list[NDArray[Any]]] = {}

    def keep(name: str, value: Any) -> None:
        seen.setdefault(name, []).append(value[0].detach().double().numpy())

    transformer, handles = reference.model.transformer, []

    def output_of(module: Any, name: str) -> None:
        handles.append(module.register_forward_hook(lambda _m, _i, out: keep(name, out)))

    def input_of(module: Any, name: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda _m, inputs: keep(name, inputs[0])))

    for number, block in enumerate(transformer.h):
        attention, prefix = block.attn.attention, f"transformer.h.{number}."
        input_of(attention.q_proj, prefix + "ln_1")
        output_of(attention.q_proj, prefix + "query")
        output_of(attention.k_proj, prefix + "key")
        output_of(attention.v_proj, prefix + "value")
        input_of(attention.out_proj, prefix + "attended")
        output_of(attention.out_proj, prefix + "attention")
        input_of(block.mlp.c_fc, prefix + "ln_2")
        output_of(block.mlp.c_fc, prefix + "c_fc")
        input_of(block.mlp.c_proj, prefix + "gelu")
        output_of(block.mlp.c_proj, prefix + "mlp")
    for number in range(1, len(transformer.h)):
        input_of(transformer.h[number].ln_1, f"transformer.h.{number - 1}.residual")
    input_of(transformer.ln_f, f"transformer.h.{len(transformer.h) - 1}.residual")
    input_of(transformer.h[0].ln_1, "transformer.embedding")
    output_of(transformer.ln_f, "transformer.final_norm")
    output_of(reference.model.lm_head, "transformer.logits")
    ids = held_out_ids(CONTEXTS, LENGTH).reshape(-1)[:TOKENS]
    for start in range(0, TOKENS, LENGTH):
        reference.logits(np.array(ids[start : start + LENGTH])[None])
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(values) for name, values in seen.items()}


def test_every_place_has_its_statistics(
    folder: Path, activations: dict[str, NDArray[np.float64]]
) -> None:
    statistics = Statistics.open(folder)
    assert statistics.tokens == TOKENS
    assert set(statistics.places) == set(activations)
    for place, values in activations.items():
        summary, scale = statistics.places[place], np.abs(values).max()
        low, high = statistics.channel_range(place)
        close = {"rtol": 0, "atol": 1e-5 * scale}
        np.testing.assert_allclose(low, values.min(axis=0), **close)
        np.testing.assert_allclose(high, values.max(axis=0), **close)
        np.testing.assert_allclose(
            statistics.channel_max(place), np.abs(values).max(axis=0), **close
        )
        np.testing.assert_allclose(statistics.channel_mean(place), values.mean(axis=0), **close)
        square = (values * values).mean(axis=0)
        np.testing.assert_allclose(statistics.channel_mean_square(place), square, rtol=1e-4)
        assert summary.mean_square == pytest.approx(square.mean(), rel=1e-5)
        assert summary.largest == pytest.approx(scale, rel=1e-5)
        for percent, found in summary.percentiles.items():
            exact = np.percentile(np.abs(values), float(percent), method="inverted_cdf")
            assert found == pytest.approx(exact, rel=2**-7 + 1e-4), (place, percent)


def test_second_moments_and_samples_of_what_matrices_read(
    folder: Path, activations: dict[str, NDArray[np.float64]]
) -> None:
    statistics = Statistics.open(folder)
    for place, values in activations.items():
        if place.rsplit(".", 1)[1] not in INPUT_PLACES:
            with pytest.raises(StatisticsError, match="second_moment of"):
                statistics.second_moment(place)
            continue
        expected = values.T @ values / TOKENS
        found = statistics.second_moment(place)
        assert np.array_equal(found, found.T)
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
        rows = np.unique(np.linspace(0, TOKENS - 1, 256).astype(np.int64))
        np.testing.assert_allclose(
            statistics.sample(place), values[rows], rtol=0, atol=1e-5 * np.abs(values).max()
        )


def test_what_the_head_expects(folder: Path, activations: dict[str, NDArray[np.float64]]) -> None:
    likely = Statistics.open(folder).likely()
    assert likely is not None
    inputs, logits = (activations[f"transformer.{place}"] for place in ("final_norm", "logits"))
    np.testing.assert_allclose(likely.inputs, inputs, rtol=0, atol=1e-5 * np.abs(inputs).max())
    expected = np.exp(log_softmax(logits))
    found = np.take_along_axis(expected, likely.tokens, axis=1)
    np.testing.assert_allclose(likely.probabilities, found, rtol=1e-3)
    # Two that are as likely may change places.
    np.testing.assert_allclose(found, -np.sort(-expected, axis=1)[:, :LIKELY], rtol=1e-3)


def test_the_largest_scores(folder: Path, activations: dict[str, NDArray[np.float64]]) -> None:
    statistics = Statistics.open(folder)
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    for layer, window in enumerate((LENGTH, 64, LENGTH, 64)):
        query, key = (activations[f"transformer.h.{layer}.{part}"] for part in ("query", "key"))
        expected = np.zeros(3)
        for start in range(0, TOKENS, LENGTH):
            rows = slice(start, start + LENGTH)
            size = len(query[rows])
            seen = ((distance >= 0) & (distance < window))[:size, :size]
            q, k = (part[rows].reshape(size, 3, 64) for part in (query, key))
            scores = np.abs(np.einsum("inc,jnc->nij", q, k)) * seen
            expected = np.maximum(expected, scores.max(axis=(1, 2)))
        np.testing.assert_allclose(statistics.score_max(layer), expected, rtol=1e-5)


def test_each_matrix_has_an_input_place(folder: Path) -> None:
    statistics = Statistics.open(folder)
    with open_checkpoint(DEMO) as checkpoint:
        matrices = {n: t for n, t in checkpoint.tensors.items() if len(t.shape) == 2}
    for name, tensor in matrices.items():
        if name != "transformer.wpe.weight":
            assert statistics.places[input_place(name)].channels == tensor.shape[1], name
    for name in ("transformer.wpe.weight", "transformer.h.0.ln_1.weight", "x"):
        with pytest.raises(ValueError, match="no matrix"):
            input_place(name)


def test_the_model_is_checked(folder: Path) -> None:
    with open_checkpoint(DEMO) as checkpoint:
        Statistics.open(folder).check_model(checkpoint)
    raw = json.loads((folder / "statistics.json").read_text())
    assert list(raw["places"])[1 : 1 + len(MEASURED_PLACES)] == [
        f"transformer.h.0.{place}" for place in MEASURED_PLACES
    ]
