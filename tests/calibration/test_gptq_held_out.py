"""What calibrated int4 wins back on text that was not calibrated on: the real bundle, run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import neo_runtime
import numpy as np
import pytest
from helpers.held_out import CALIBRATION_STORIES, judged_pieces, story_lines
from helpers.models import DEMO, Reference
from neo_calibration.cli import main as calibrate
from neo_export.comparison.metrics import cross_entropy, kl_divergence
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.targets import Quantization

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LENGTH = 512
EVERY = 8
"""The divergence, which varies less, is taken of one piece in so many."""


@dataclass(frozen=True)
class Exact:
    """What float32 makes of the pieces."""

    cross_entropy: NDArray[np.float64]
    """[pieces]: mean of each, nats."""
    logits: list[NDArray[np.float32]]
    """[LENGTH, V] of one piece in EVERY."""


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    text = folder / "text.jsonl"
    text.write_text("\n".join(story_lines(CALIBRATION_STORIES)), encoding="utf-8")
    command = [str(DEMO), "--text", str(text), "-o", str(folder / "stats")]
    assert calibrate([*command, "--tokens", "49152"]) == 0
    return folder / "stats"


@pytest.fixture(scope="module")
def exact(reference: Reference) -> Exact:
    entropies, kept = [], []
    for number, ids in enumerate(judged_pieces(LENGTH)):
        logits = reference.logits(ids[None])[0]
        entropies.append(cross_entropy(logits[:-1], ids[1:]).mean())
        if number % EVERY == 0:
            kept.append(logits)
    return Exact(np.array(entropies), kept)


def losses(
    folder: Path, options: ExportOptions, exact: Exact
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nats by which each piece's mean cross-entropy is higher; divergence of one in EVERY."""
    export_bundle(str(DEMO), folder, options)
    entropies, divergences = [], []
    with neo_runtime.load(folder, threads=1) as model:
        for number, ids in enumerate(judged_pieces(LENGTH)):
            logits = model.logits(ids)
            entropies.append(cross_entropy(logits[:-1], ids[1:]).mean())
            if number % EVERY == 0:
                divergences.append(kl_divergence(exact.logits[number // EVERY], logits).mean())
    return np.array(entropies) - exact.cross_entropy, np.array(divergences)


def won_back(
    what: str, rounded: NDArray[np.float64], calibrated: NDArray[np.float64]
) -> tuple[float, float]:
    """The share of a loss [pieces], and the lower end of its 95 % interval (paired bootstrap)."""
    draws = np.random.default_rng(0).integers(0, len(rounded), (10000, len(rounded)))
    shares = 1 - calibrated[draws].mean(axis=1) / rounded[draws].mean(axis=1)
    low, high = np.quantile(shares, (0.025, 0.975))
    share = 1 - float(calibrated.mean() / rounded.mean())
    print(
        f"{what}: {rounded.mean():.5f} nats rounded, {calibrated.mean():.5f} calibrated; "
        f"won back {share:.1%} ({low:.1%} to {high:.1%}) on {len(rounded)} pieces"
    )
    return share, float(low)


@pytest.mark.parametrize("block", [32, 64])
def test_int4_wins_back_half(block: int, statistics: Path, exact: Exact, tmp_path: Path) -> None:
    """Of what rounding loses: at least half of the log-perplexity, and surely of the divergence.

    docs/quantization.md has the figures that this prints.
    """
    quantization = Quantization(block_size=block)
    options = ExportOptions(precision="int4", quantization=quantization)
    rounded = losses(tmp_path / "rounded", options, exact)
    options = ExportOptions(precision="int4", quantization=quantization, calibration=statistics)
    calibrated = losses(tmp_path / "calibrated", options, exact)
    share, low = won_back(f"block {block}, log-perplexity", rounded[0], calibrated[0])
    assert share >= 0.5
    # 0.53 and 0.55 where it was measured; another processor turns some integers, and two points.
    assert low > 0.45
    _, low = won_back(f"block {block}, KL divergence", rounded[1], calibrated[1])
    assert low > 0.54
