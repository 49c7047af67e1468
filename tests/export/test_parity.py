"""Every position of every graph against PyTorch, float32: the worst one counts."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.models import (
    ODD_CONFIGS,
    Reference,
    TinyConfig,
    make_checkpoint,
    random_ids,
)
from helpers.running import Graphs, assert_agrees
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.passes.fuse_attention import HEAD_SIZE_MULTIPLE
from neo_export.tolerances import TOLERANCES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

LIMIT = TOLERANCES["fp32"].logits


@dataclass(frozen=True)
class Case:
    """A tiny model, exported, and PyTorch's logits of one text of the greatest length."""

    config: TinyConfig
    reference: Reference
    graphs: Graphs
    ids: NDArray[np.int64]
    """[1, max_position_embeddings]"""
    logits: NDArray[np.float32]
    """[1, max_position_embeddings, vocabulary]. Attention is causal: the first n positions are
    the answer for the first n tokens alone."""

    @property
    def end(self) -> int:
        return self.config.max_position_embeddings

    def lengths(self) -> list[int]:
        """Just before, at and behind the window, and the very last position."""
        window = self.config.window_size
        around = {n for n in (window - 1, window, window + 1) if 1 <= n <= self.end}
        return sorted(around | {self.end})


IN_PLACE = [
    f"{name}-cpu"
    for name, config in ODD_CONFIGS.items()
    if config.head_dim % HEAD_SIZE_MULTIPLE == 0
]
APPEND = [f"{name}-portable" for name in ODD_CONFIGS] + [
    f"{name}-cpu" for name in ODD_CONFIGS if f"{name}-cpu" not in IN_PLACE
]
STATIC = [f"{name}-tensorrt" for name in ODD_CONFIGS]


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, Reference]]:
    """Each configuration's checkpoint and reference, made once."""

    @functools.cache
    def make(name: str) -> tuple[Path, Reference]:
        folder = make_checkpoint(tmp_path_factory.mktemp(name), ODD_CONFIGS[name])
        return folder, Reference(folder)

    return make


@pytest.fixture(scope="module", params=sorted(IN_PLACE + APPEND + STATIC))
def case(
    request: pytest.FixtureRequest,
    checkpoints: Callable[[str], tuple[Path, Reference]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    name, target = request.param.split("-")
    config = ODD_CONFIGS[name]
    folder, reference = checkpoints(name)
    bundle = tmp_path_factory.mktemp("bundle") / target
    export_bundle(str(folder), bundle, ExportOptions(target=target))
    ids = random_ids(config, 1, config.max_position_embeddings)
    return Case(config, reference, Graphs(bundle), ids, reference.logits(ids))


in_place = pytest.mark.parametrize("case", IN_PLACE, indirect=True)
append = pytest.mark.parametrize("case", APPEND, indirect=True)
right_padded = pytest.mark.parametrize("case", IN_PLACE + STATIC, indirect=True)


def test_cache_layout(case: Case) -> None:
    """In place where fused, and that is where the head size is a multiple of 8."""
    target, layout = case.graphs.manifest.target, case.graphs.manifest.cache
    expected = ("append", "left")
    if target == "tensorrt":
        expected = ("static", "right")
    elif target == "cpu" and case.config.head_dim % 8 == 0:
        expected = ("in_place", "right")
    assert (layout.layout, layout.padding) == expected


def test_reference_text_is_selective(case: Case) -> None:
    """The window must matter to the text, or a wrong one would pass here."""
    changed = case.ids.copy()
    changed[0, 0] = (changed[0, 0] + 1) % case.config.vocab_size
    moved = np.abs(case.reference.logits(changed) - case.logits)[0].max(axis=-1)
    layers, window = case.config.attention_layers, case.config.window_size
    reach = (window - 1) * len(layers) if set(layers) == {"local"} else case.end
    assert (moved[: reach + 1] > 1e-3).all()
    assert (moved[reach + 1 :] == 0).all()


def test_score(case: Case) -> None:
    for length in case.lengths():
        found = case.graphs.run("score", case.ids[:, :length])
        assert_agrees(found, case.logits[:, :length], LIMIT)


def test_prefill_of_every_length(case: Case) -> None:
    found = [case.graphs.run("prefill", case.ids[:, :n]) for n in range(1, case.end + 1)]
    assert_agrees(np.concatenate(found, axis=1), case.logits, LIMIT)


def test_decode_from_an_empty_past(case: Case) -> None:
    cache = case.graphs.cache()
    found = [case.graphs.run("decode", case.ids[:, n : n + 1], cache) for n in range(case.end)]
    assert_agrees(np.concatenate(found, axis=1), case.logits, LIMIT)


def test_decode_behind_a_prompt(case: Case) -> None:
    for prompt in case.lengths():
        cache = case.graphs.cache()
        found = [case.graphs.run("prefill", case.ids[:, :prompt], cache)]
        end = min(case.end, prompt + case.config.window_size + 2)
        found += [
            case.graphs.run("decode", case.ids[:, n : n + 1], cache) for n in range(prompt, end)
        ]
        expected = case.logits[:, prompt - 1 : end]
        assert_agrees(np.concatenate(found, axis=1), expected, LIMIT)


@pytest.mark.parametrize("chunk", [1, 3, "window", "window+1"])
@pytest.mark.parametrize("graph", ["prefill", "score"])
def test_chunks(case: Case, graph: str, chunk: int | str) -> None:
    if isinstance(chunk, str):
        chunk = case.config.window_size + chunk.endswith("+1")
    cache = case.graphs.cache()
    for start in range(0, case.end, chunk):
        ids = case.ids[:, start : start + chunk]
        expected = case.logits[:, start : start + chunk]
        found = case.graphs.run(graph, ids, cache)
        assert_agrees(found, expected if graph == "score" else expected[:, -1:], LIMIT)


@in_place
def test_local_layers_take_longer_buffers_too(case: Case) -> None:
    """An engine that knows nothing of windows gives every layer buffers of full length."""
    window = case.graphs.manifest.cache.window
    for local_length in (case.config.window_size + 3, max(case.end, case.config.window_size)):
        cache = case.graphs.cache(local_length=local_length if window is not None else None)
        found = [case.graphs.run("score", case.ids[:, :3], cache)]
        found.append(case.graphs.run("score", case.ids[:, 3:14], cache))
        found += [
            case.graphs.run("decode", case.ids[:, n : n + 1], cache) for n in range(14, case.end)
        ]
        assert_agrees(np.concatenate(found, axis=1), case.logits, LIMIT)


@right_padded
def test_ragged_batch_padded_on_the_right(case: Case) -> None:
    """The first prompts in one call; then each row decodes at positions of its own."""
    graphs, steps = case.graphs, 6
    counts = np.array([case.end - steps, 1, case.config.window_size, 5])
    counts = np.minimum(counts, case.end - steps)
    width = int(counts.max())
    ids = random_ids(case.config, len(counts), case.end, seed=2)
    expected = case.reference.logits(ids)
    mask = (np.arange(width) < counts[:, None]).astype(np.int64)
    rows = np.arange(len(counts))
    cache = graphs.cache(batch=len(counts))
    together = case.reference.logits(ids[:, :width], mask)
    scored = graphs.run("score", ids[:, :width], attention_mask=mask)
    for row, count in enumerate(counts):
        assert_agrees(scored[row, :count], expected[row, :count], LIMIT)
        assert_agrees(scored[row, :count], together[row, :count], LIMIT)
    found = graphs.run("prefill", ids[:, :width], cache, attention_mask=mask)
    assert_agrees(found[:, 0], expected[rows, counts - 1], LIMIT)
    for at in (counts + step for step in range(steps)):
        mask = (np.arange(cache.length) <= at[:, None]).astype(np.int64)
        new = ids[rows, at][:, None]
        found = graphs.run("decode", new, cache, attention_mask=mask, position_ids=at[:, None])
        assert_agrees(found[:, 0], expected[rows, at], LIMIT)


def test_rows_of_a_batch_are_chunked_one_by_one(case: Case) -> None:
    """Later chunks go row by row, into that row of the buffers; then all rows decode together."""
    ids = random_ids(case.config, 3, 12, seed=3)
    expected = case.reference.logits(ids)
    batch = case.graphs.cache(batch=3, length=14)
    case.graphs.run("prefill", ids[:, :4], batch)
    rows = [batch.row(index, 4) for index in range(3)]
    for index, row in enumerate(rows):
        for start, end in ((4, 9), (9, 11)):
            found = case.graphs.run("prefill", ids[index : index + 1, start:end], row)
            assert_agrees(found[0, 0], expected[index, end - 1], LIMIT)
    if not batch.in_place:
        batch.tensors = {
            name: np.concatenate([row.tensors[name] for row in rows]) for name in batch.tensors
        }
    batch.tokens = 11
    found = case.graphs.run("decode", ids[:, 11:], batch)
    assert_agrees(found[:, 0], expected[:, 11], LIMIT)


@append
def test_any_mask(case: Case) -> None:
    """Left padding and holes: the portable form takes the mask as PyTorch does."""
    width = case.end
    generator = np.random.default_rng(4)
    mask = np.ones((4, width), dtype=np.int64)
    mask[1, : width // 2] = 0
    mask[2] = generator.random(width) < 0.6
    mask[3, : width - 1] = 0
    mask[:, -1] = 1
    ids = random_ids(case.config, 4, width, seed=5)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    expected = case.reference.logits(ids, mask, positions)
    valid = mask.astype(bool)

    def run(graph: str, start: int, end: int) -> NDArray[np.float32]:
        part = slice(start, end)
        return case.graphs.run(
            graph,
            ids[:, part],
            cache,
            attention_mask=mask[:, :end],
            position_ids=positions[:, part],
        )

    cache = case.graphs.cache(batch=4)
    assert_agrees(run("score", 0, width)[valid], expected[valid], LIMIT)
    cache = case.graphs.cache(batch=4)
    assert_agrees(run("prefill", 0, width)[:, 0], expected[:, -1], LIMIT)

    # The same text in two chunks and single tokens; a row whose new tokens are all padding
    # promises nothing.
    cache = case.graphs.cache(batch=4)
    half = width - 5
    found = run("prefill", 0, half)
    last = half - 1 - np.argmax(mask[:, :half][:, ::-1], axis=1)
    some = mask[:, :half].any(axis=1)
    assert_agrees(found[some, 0], expected[np.arange(4), last][some], LIMIT)
    new = slice(half, half + 2)
    found = run("score", half, half + 2)
    assert_agrees(found[valid[:, new]], expected[:, new][valid[:, new]], LIMIT)
    for n in range(half + 2, width):
        found = run("decode", n, n + 1)
        assert_agrees(found[valid[:, n], 0], expected[valid[:, n], n], LIMIT)

    # Left padding alone: the row is what it would be without its neighbours and its padding.
    alone = case.reference.logits(ids[1:2, width // 2 :])
    assert_agrees(expected[1, width // 2 :], alone[0], LIMIT)


@pytest.fixture(scope="module")
def demo_text(reference: Reference) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    ids = np.random.default_rng(6).integers(0, 4096, (1, 512), dtype=np.int64)
    return ids, reference.logits(ids)


@pytest.mark.parametrize("bundle", ["mini_bundle", "portable_bundle", "tensorrt_bundle"])
def test_demo_model(
    bundle: str,
    request: pytest.FixtureRequest,
    demo_text: tuple[NDArray[np.int64], NDArray[np.float32]],
) -> None:
    """neo-mini: window 64, 512 positions."""
    graphs = Graphs(request.getfixturevalue(bundle))
    ids, expected = demo_text
    for length in (63, 64, 65, 512):
        assert_agrees(graphs.run("score", ids[:, :length]), expected[:, :length], LIMIT)
        found = graphs.run("prefill", ids[:, :length])
        assert_agrees(found, expected[:, length - 1 : length], LIMIT)
    cache = graphs.cache()
    for start, end in ((0, 50), (50, 64), (64, 65), (65, 300), (300, 480)):
        found = graphs.run("prefill", ids[:, start:end], cache)
        assert_agrees(found, expected[:, end - 1 : end], LIMIT)
    for n in range(480, 512):
        found = graphs.run("decode", ids[:, n : n + 1], cache)
        assert_agrees(found, expected[:, n : n + 1], LIMIT)
    cache = graphs.cache()
    for n in range(130):
        found = graphs.run("decode", ids[:, n : n + 1], cache)
        assert_agrees(found, expected[:, n : n + 1], LIMIT)
