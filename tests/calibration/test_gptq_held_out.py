"""What calibrated int4 wins back on text that was not calibrated on: the real bundle, run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import neo_runtime
import numpy as np
import pytest
from helpers.held_out import CALIBRATION_STORIES, judged_pieces, story_lines
from helpers.models import DEMO, Reference
from neo_calibration.cli import main as calibrate
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.metrics import cross_entropy
from neo_export.targets import Quantization

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LENGTH = 512


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    text = folder / "text.jsonl"
    text.write_text("\n".join(story_lines(CALIBRATION_STORIES)), encoding="utf-8")
    command = [str(DEMO), "--text", str(text), "-o", str(folder / "stats")]
    assert calibrate([*command, "--tokens", "49152"]) == 0
    return folder / "stats"


@pytest.fixture(scope="module")
def exact(reference: Reference) -> NDArray[np.float64]:
    """[pieces]: mean cross-entropy of each in float32, nats."""
    pieces = judged_pieces(LENGTH)
    return np.array(
        [cross_entropy(reference.logits(ids[None])[0, :-1], ids[1:]).mean() for ids in pieces]
    )


def rises(folder: Path, options: ExportOptions, exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """[pieces]: by how much the mean cross-entropy of each is higher; nats."""
    export_bundle(str(DEMO), folder, options)
    with neo_runtime.load(folder, threads=1) as model:
        found = [
            cross_entropy(model.logits(ids)[:-1], ids[1:]).mean() for ids in judged_pieces(LENGTH)
        ]
    return np.array(found) - exact


@pytest.mark.parametrize("block", [32, 64])
def test_int4_wins_back_half(
    block: int, statistics: Path, exact: NDArray[np.float64], tmp_path: Path
) -> None:
    """At least half of the perplexity that rounding loses; see docs/quantization.md."""
    quantization = Quantization(block_size=block)
    options = ExportOptions(precision="int4", quantization=quantization)
    rounded = rises(tmp_path / "rounded", options, exact)
    options = ExportOptions(precision="int4", quantization=quantization, calibration=statistics)
    calibrated = rises(tmp_path / "calibrated", options, exact)
    both = np.stack([rounded, calibrated])
    lost = np.expm1(both.mean(axis=1))
    draws = np.random.default_rng(0).integers(0, len(exact), (10000, len(exact)))
    drawn = np.expm1(both[:, draws].mean(axis=2))
    low, high = np.quantile(1 - drawn[1] / drawn[0], (0.025, 0.975))
    won = 1 - lost[1] / lost[0]
    print(f"{lost[0]:+.2%} rounded, {lost[1]:+.2%} calibrated: {won:.1%} ({low:.1%}, {high:.1%})")
    assert won >= 0.5
    assert low > 0.4
