"""Bundles with an int8 cache through the runtime."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import neo_runtime
import numpy as np
import pytest
from helpers.beginnings import assert_beginnings_hold
from helpers.cropping import assert_crops_hold
from helpers.held_out import held_out_ids, perplexity
from helpers.int8_cache import calibrated
from helpers.joining import assert_rows_join
from helpers.models import DEMO, TinyConfig, make_checkpoint, random_ids
from helpers.prefixes import assert_prefixes_hold
from helpers.rounding import rounded_to_nearest
from helpers.running import relative_l2
from neo_export.command.cli import main as export
from neo_export.tolerances import TOLERANCES
from neo_runtime.backends.cpu.staged_cache import StagedCache

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from neo_runtime import Model
    from numpy.typing import NDArray

LENGTH = 512
PIECES = 8
PERPLEXITY = 1.005
"""Of the float cache's, at most."""
PROMPTS = (200, 1, 64, 30)
STEPS = 20


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Over other text than what is measured."""
    text = held_out_ids(PIECES + 2, LENGTH)[PIECES:]
    return calibrated(DEMO, text, tmp_path_factory.mktemp("calibration") / "statistics")


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def precision(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def bundle(
    precision: str, statistics: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """By cache: "float" and "int8"."""
    folder = tmp_path_factory.mktemp(precision)
    calibrated = ["--calibration", str(statistics)]
    # Statistics move outliers into the weights: both have them, so that only the cache differs.
    wanted = {
        "float": [] if precision == "fp32" else calibrated,
        "int8": ["--kv-cache", "int8", *calibrated],
    }
    with rounded_to_nearest():
        for name, flags in wanted.items():
            assert export([str(DEMO), "-o", str(folder / name), f"--{precision}", *flags]) == 0
    return {name: folder / name for name in wanted}


@pytest.fixture(scope="module")
def model(bundle: dict[str, Path]) -> Iterator[Model]:
    with neo_runtime.load(bundle["int8"], threads=1) as loaded:
        yield loaded


def by_decode(model: Model, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [S, V] with each token read from the cache of those before it."""
    with model.new_cache(1, len(ids)) as cache:
        return np.concatenate([model.decode(cache, [token]).copy() for token in ids])


def by_chunks(model: Model, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Two logits a turn: behind a chunk of 31 tokens, and behind one more."""
    found = np.zeros((len(ids), model.manifest.model.vocab_size), np.float32)
    with model.new_cache(1, len(ids)) as cache:
        for start in range(0, len(ids), 32):
            found[start + 30] = model.prefill(cache, [ids[start : start + 31]])[0]
            found[start + 31] = model.decode(cache, [ids[start + 31]])[0]
    return found


def test_perplexity_is_that_of_the_float_cache(
    precision: str, bundle: dict[str, Path], model: Model
) -> None:
    """Scored, and for some of the text through the cache itself, token by token."""
    pieces = held_out_ids(PIECES, LENGTH)
    with neo_runtime.load(bundle["float"], threads=1) as exact:
        expected = perplexity(exact.logits, pieces)
        first = perplexity(exact.logits, pieces[:2])
    assert perplexity(model.logits, pieces) <= PERPLEXITY * expected
    decoded = perplexity(lambda ids: by_decode(model, ids), pieces[:2])
    assert abs(decoded / first - 1) <= PERPLEXITY - 1


def test_scoring_measures_what_generation_does(precision: str, model: Model) -> None:
    ids = held_out_ids(1, LENGTH)[0]
    scored = model.logits(ids)
    limit = TOLERANCES["int8-cache"] if precision == "fp32" else TOLERANCES[precision]
    seen = np.sort([*range(30, LENGTH, 32), *range(31, LENGTH, 32)])
    for found, expected in (
        (by_decode(model, ids), scored),
        (by_chunks(model, ids)[seen], scored[seen]),
    ):
        error = relative_l2(found, expected)
        assert error.max() <= limit.logits
        assert np.median(error) <= (1e-5 if precision == "fp32" else limit.typical or 0)


def continued(model: Model, rows: list[int], length: int) -> NDArray[np.float32]:
    """Logits [1 + STEPS, rows, V] of these rows together: their prompts, then their own text."""
    text = held_out_ids(len(PROMPTS), 256)
    with model.new_cache(len(rows), length) as cache:
        found = [model.prefill(cache, [text[row, : PROMPTS[row]] for row in rows]).copy()]
        for step in range(STEPS):
            tokens = [int(text[row, PROMPTS[row] + step]) for row in rows]
            found.append(model.decode(cache, tokens).copy())
    return np.stack(found)


def test_rows_together_as_alone_and_however_long_the_buffers(precision: str, model: Model) -> None:
    """Buffers of 512 are staged for a prompt of 200, those of 256 are not."""
    rows = list(range(len(PROMPTS)))
    together = continued(model, rows, 512)
    for other in (
        np.concatenate([continued(model, [row], 512) for row in rows], axis=1),
        continued(model, rows, 256),
    ):
        difference = relative_l2(together, other)
        assert np.median(difference) <= TOLERANCES["fp32"].logits
        limit = TOLERANCES["int8-cache"] if precision == "fp32" else TOLERANCES[precision]
        assert difference.max() <= limit.logits


@pytest.mark.parametrize("precision", ["fp32"], indirect=True)
def test_rows_join_and_begin_with_another_cache(model: Model) -> None:
    """As scoring, which rounds keys and values alike; PyTorch is what scoring is compared with."""
    limit = TOLERANCES["int8-cache"].logits
    assert_rows_join(model, limit, model.logits)
    assert_prefixes_hold(model, limit, model.logits)
    assert_beginnings_hold(model, limit, model.logits)
    assert_crops_hold(model, limit, model.logits)


@pytest.mark.parametrize("precision", ["fp32"], indirect=True)
def test_a_quarter_of_the_bytes(bundle: dict[str, Path], model: Model) -> None:
    with neo_runtime.load(bundle["float"], threads=1) as exact:
        assert 4 * model.cache_bytes(3, 400) == exact.cache_bytes(3, 400)
    with model.new_cache(3, 400) as cache:
        assert cache.nbytes == model.cache_bytes(3, 400)


@pytest.mark.parametrize("precision", ["fp32"], indirect=True)
def test_rows_change_places(model: Model) -> None:
    text = held_out_ids(3, 128)
    with model.new_cache(3, 300) as cache, model.new_cache(2, 300) as other:
        model.prefill(cache, [text[0, :100], text[1, :40], text[2, :70]])
        cache.reorder([2, 0])
        model.prefill(other, [text[2, :70], text[0, :100]])
        found = model.decode(cache, [5, 6]).copy()
        assert np.array_equal(found, model.decode(other, [5, 6]))


@pytest.mark.parametrize("precision", ["fp32"], indirect=True)
def test_text_streams_and_beams(model: Model) -> None:
    options = {"max_new_tokens": 80, "ignore_eos": True}
    whole = model.generate("Once upon a time", **options)
    with model.stream("Once upon a time", **options) as pieces:
        assert "".join(pieces) == whole.text
    one = model.generate("Once upon a time", num_beams=3, max_new_tokens=20)
    assert one.text


def test_staging_leaves_the_rest_alone() -> None:
    buffers = [np.full((1, 2, size, 4), 7, np.int8) for size in (20, 5)]
    staged = StagedCache(buffers, [True, False], 3, 5)
    assert [array.shape[2] for array in staged.present] == [5, 5]
    assert staged.present[1] is buffers[1]
    assert (staged.past[0][:, :, :3] == 7).all()
    staged.present[0][...] = 9
    staged.store()
    assert (buffers[0][0, 0, :, 0] == [7] * 3 + [9] * 2 + [7] * 15).all()


def test_staging_of_a_first_prompt_has_no_past() -> None:
    buffers = [np.zeros((2, 2, 20, 4), np.int8)]
    staged = StagedCache(buffers, [True], 0, 6)
    assert staged.past[0].shape == (2, 2, 0, 4)
    assert staged.present[0].shape == (2, 2, 6, 4)


FLAGS = ["--kv-cache", "int8"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (FLAGS, "neo-calibrate"),
        ([*FLAGS, "--fp16", "--calibration", "STATISTICS"], "target cuda; use --target cpu"),
        ([*FLAGS, "--target", "portable", "--calibration", "STATISTICS"], "target cpu"),
        ([*FLAGS, "--calibration", "MISSING"], "statistics.json"),
        ([*FLAGS, "--calibration", "OTHER"], "another model"),
    ],
)
def test_what_cannot_be(
    flags: list[str],
    message: str,
    statistics: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each says so, and nothing is written."""
    if "OTHER" in flags:
        config = TinyConfig()
        other = make_checkpoint(tmp_path / "tiny", config)
        calibrated(other, random_ids(config, 1, 40), tmp_path / "other")
    places = {
        "STATISTICS": str(statistics),
        "MISSING": str(tmp_path / "missing"),
        "OTHER": str(tmp_path / "other"),
    }
    command = [places.get(flag, flag) for flag in flags]
    assert export([str(DEMO), "-o", str(tmp_path / "bundle"), *command]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_the_manifest_tells(bundle: dict[str, Path], precision: str) -> None:
    manifest = json.loads((bundle["int8"] / "neo.json").read_text())
    assert manifest["cache"]["dtype"] == "int8"
    types = {i["dtype"] for i in manifest["graphs"]["decode"]["inputs"] if "past" in i["name"]}
    assert types == {"int8"}


@pytest.mark.parametrize("length", [60, 63, 64, 65, 72, 79, 80, 81, 96])
def test_sequences_about_as_long_as_the_window(length: int, bundle: dict[str, Path]) -> None:
    """A local layer's buffers are then as long as the others, and still have to hold a window."""
    ids = held_out_ids(1, LENGTH)[0]
    with neo_runtime.load(bundle["int8"], threads=1) as model:
        found = []
        for room in (length, LENGTH):
            with model.new_cache(1, room) as cache:
                logits = [model.prefill(cache, [ids[:5]]).copy()]
                logits += [model.decode(cache, [token]).copy() for token in ids[5:length]]
            found.append(np.concatenate(logits))
        # The buffers' length changes the order of sums, and so may move a value to a neighbour.
        assert np.median(relative_l2(*found)) <= TOLERANCES["int8"].typical
        text = model.generate(
            "Once upon a time", max_new_tokens=length - 4, ignore_eos=True, suppress_tokens=[]
        )
        assert len(text.token_ids) == length - 4
