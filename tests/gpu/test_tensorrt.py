"""Backend tensorrt on a real GPU: a plan that is built here, against PyTorch."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from helpers.beginnings import assert_beginnings_hold
from helpers.cropping import assert_crops_hold
from helpers.forced import assert_forced_tokens_fit
from helpers.guessing import assert_guesses_change_nothing
from helpers.joining import assert_rows_join
from helpers.models import DEMO, ODD_CONFIGS, Reference, make_checkpoint
from helpers.parity import assert_parity
from helpers.prefixes import assert_prefixes_hold
from helpers.running import relative_l2
from neo_export.engine.device import device_for
from neo_export.engine.flavour import find_flavour
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.tolerances import TOLERANCES
from neo_runtime.backends.tensorrt.plan import installed_modules
from neo_runtime.errors import NeoError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from neo_runtime.machine.gpu import GpuFacts
    from neo_runtime.model import Model

pytestmark = pytest.mark.gpu
LIMIT = TOLERANCES["fp16"].logits


@pytest.fixture(scope="module")
def tensorrt(gpu: GpuFacts) -> None:
    try:
        installed_modules()
        device_for(find_flavour(), None)
    except NeoError as error:
        pytest.skip(f"no TensorRT: {error}")


def plan_of(source: Path, bundle: Path) -> Path:
    export_bundle(str(source), bundle, ExportOptions(target="tensorrt", precision="fp16"))
    command = [sys.executable, "-m", "neo_export.engine.cli", str(bundle), "--max-batch", "3"]
    subprocess.run(command, check=True)
    return bundle


@pytest.fixture(scope="module")
def model(tensorrt: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    bundle = plan_of(DEMO, tmp_path_factory.mktemp("tensorrt") / "bundle")
    with neo_runtime.load(bundle, backend="tensorrt") as model:
        yield model


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_checkpoints_that_stand_out(name: str, tensorrt: None, tmp_path: Path) -> None:
    """Windows, heads, layers and vocabularies of all kinds, by every way that a service calls."""
    config = ODD_CONFIGS[name]
    source = make_checkpoint(tmp_path / "model", config)
    bundle = plan_of(source, tmp_path / "bundle")
    with neo_runtime.load(bundle, backend="tensorrt") as model:
        assert_parity(model, Reference(source), config, LIMIT)


@pytest.fixture(scope="module")
def text(reference: Reference) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    ids = np.random.default_rng(6).integers(0, 4096, (1, 512), dtype=np.int64)
    return ids, reference.logits(ids)


def test_every_position(model: Model, text: tuple[Any, Any]) -> None:
    ids, expected = text
    assert relative_l2(model.logits(ids[0]), expected[0]).max() <= LIMIT


def test_prefill_and_decode_across_the_window_to_the_end(
    model: Model, text: tuple[Any, Any]
) -> None:
    ids, expected = text
    for prompt in (1, 63, 64, 65, 300, 500):
        with model.new_cache(1, 512) as cache:
            found = [model.prefill(cache, [ids[0, :prompt]])]
            found += [model.decode(cache, [ids[0, n]]) for n in range(prompt, prompt + 12)]
        error = relative_l2(np.concatenate(found), expected[0, prompt - 1 : prompt + 12])
        assert error.max() <= LIMIT


def test_ragged_batches(model: Model, text: tuple[Any, Any]) -> None:
    ids, expected = text
    counts = [7, 130, 64]
    with model.new_cache(3, 200) as cache:
        found = model.prefill(cache, [ids[0, :n] for n in counts])
        step = model.decode(cache, [ids[0, n] for n in counts])
    for row, n in enumerate(counts):
        assert relative_l2(found[row], expected[0, n - 1]).max() <= LIMIT
        assert relative_l2(step[row], expected[0, n]).max() <= LIMIT


def test_rows_join_and_begin_with_another_cache(model: Model) -> None:
    assert_rows_join(model, LIMIT)
    assert_prefixes_hold(model, LIMIT)
    assert_beginnings_hold(model, LIMIT)
    assert_crops_hold(model, LIMIT)


def test_texts(model: Model) -> None:
    assert model.generate("Once upon a time", max_new_tokens=30).text
    assert model.generate("Once upon a time", max_new_tokens=10, num_beams=3).text


def test_guesses_change_nothing(model: Model) -> None:
    assert_guesses_change_nothing(model, 0.05)


def test_forced_tokens_fit(model: Model) -> None:
    assert_forced_tokens_fit(model, 0.05)
