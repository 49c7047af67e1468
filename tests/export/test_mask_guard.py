"""A fused graph honours a mask or refuses it: every small situation, one by one.

    S new tokens, a cache of P positions, a mask of width W: all up to 4, all masks of 0 and 1,
    of one row and of two.

What a situation means is what `neo_export.passes.fuse_attention._lengths` says. PyTorch is asked
about the row's whole text, without a cache, so that nothing of ours is on both sides.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.models import Reference, TinyConfig, make_checkpoint, random_ids
from helpers.running import Graphs, assert_agrees
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.passes.fuse_attention import GUARD_NODE
from neo_export.targets import TARGETS
from neo_export.targets.cuda import CUDA
from neo_export.tolerances import TOLERANCES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from neo_export.passes import Pass
    from neo_export.targets import PassContext
    from numpy.typing import NDArray

LIMIT = TOLERANCES["fp32"].logits
LARGEST = 4


def _config(window_size: int, *attention_layers: str) -> TinyConfig:
    return TinyConfig(
        vocab_size=11,
        num_heads=1,
        head_dim=8,
        attention_layers=attention_layers,
        window_size=window_size,
        max_position_embeddings=2 * LARGEST,
    )


CONFIGS = {
    "full_caches": _config(3, "local"),
    "window_caches": _config(2, "global", "local"),
    "device": _config(2, "global", "local"),
}
"""Where no layer is global every cache is of full length, else local ones evict. `device` is the
form for CUDA, here in float32: a row that it cannot honour becomes NaN."""

Mask = tuple[int, ...]


@dataclass(frozen=True)
class Situation:
    """Widths, and a mask a row."""

    new: int
    past: int
    mask: tuple[Mask, ...]

    @property
    def width(self) -> int:
        return len(self.mask[0])

    @property
    def first_prompt(self) -> bool:
        return self.width == self.new


@dataclass(frozen=True, eq=False)
class Model:
    """The fused graphs, PyTorch, and two texts whose beginnings lie in the cache."""

    config: TinyConfig
    graphs: Graphs
    reference: Reference
    cached: NDArray[np.int64]
    """[2, 4]: the tokens behind the cache's positions."""
    tensors: dict[str, NDArray[np.float32]]
    """Their keys and values by input name, [2, 1, 4, 8]."""
    tokens: NDArray[np.int64]
    """[2, 4]: the new tokens."""

    @functools.cache  # noqa: B019 - one model a test run
    def expected(self, row: int, past: int, new: int, mask: Mask) -> NDArray[np.float32]:
        """Logits [S, V] of the new tokens behind the first `past` cached ones."""
        ids = np.concatenate([self.cached[row, :past], self.tokens[row, :new]])
        positions = np.concatenate([np.arange(past), _positions(sum(mask), new, past + new)])
        logits = self.reference.logits(ids[None], np.array([mask]), positions[None])
        return logits[0, past:]


def _in_float32(context: PassContext) -> list[Pass]:
    """CUDA's passes, but for those of half precision."""
    half = ("float16", "fuse_skip_layer_norm")
    return [step for step in CUDA.passes(context) if step.__name__ not in half]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    config = CONFIGS[request.param]
    folder = tmp_path_factory.mktemp("guard")
    checkpoint = str(make_checkpoint(folder / "checkpoint", config))
    with pytest.MonkeyPatch.context() as patch:
        device = replace(
            TARGETS["cuda"], precisions=("fp32",), half_activations=False, passes=_in_float32
        )
        patch.setitem(TARGETS, "cuda", device)
        target = "cuda" if request.param == "device" else "cpu"
        export_bundle(checkpoint, folder / "fused", ExportOptions(target=target))
    export_bundle(checkpoint, folder / "portable", ExportOptions(target="portable"))
    cached = random_ids(config, 2, LARGEST, seed=7)
    graphs = Graphs(folder / "portable")
    cache = graphs.cache(batch=2)
    graphs.run("prefill", cached, cache)
    return Model(
        config=config,
        graphs=Graphs(folder / "fused"),
        reference=Reference(folder / "checkpoint"),
        cached=cached,
        tensors={f"past_key_values.{name}": tensor for name, tensor in cache.tensors.items()},
        tokens=random_ids(config, 2, LARGEST, seed=8),
    )


def _positions(valid: int, new: int, width: int) -> NDArray[np.int64]:
    """Of the new tokens: from 0 in a first prompt, else the last of the valid positions."""
    return np.arange(new) + (0 if width == new else max(valid - new, 0))


def _situations(new_tokens: int) -> Iterator[Situation]:
    sizes = range(1, LARGEST + 1)
    for past, width, batch in itertools.product(range(LARGEST + 1), sizes, (1, 2)):
        rows = itertools.product((0, 1), repeat=width)
        for mask in itertools.product(rows, repeat=batch):
            yield Situation(new_tokens, past, mask)


def _run(model: Model, graph: str, case: Situation) -> dict[str, NDArray[Any]] | str:
    """Outputs, or the message of the error."""
    batch = len(case.mask)
    positions = [_positions(sum(row), case.new, case.width) for row in case.mask]
    feeds: dict[str, NDArray[Any]] = {
        "input_ids": model.tokens[:batch, : case.new],
        "attention_mask": np.array(case.mask, dtype=np.int64),
        "position_ids": np.array(positions),
    }
    for name, tensor in model.tensors.items():
        feeds[name] = tensor[:batch, :, : case.past].copy()
    session = model.graphs.session(graph)
    names = [output.name for output in session.get_outputs()]
    try:
        outputs = session.run(names, feeds)
    except Exception as error:
        return str(error)
    return dict(zip(names, outputs, strict=True))


def _run_in_place(model: Model, graph: str, case: Situation) -> NDArray[np.float32]:
    """Logits with the cache's own buffers bound as past and as present."""
    batch = len(case.mask)
    cache = model.graphs.cache(batch, case.past, local_length=case.past)
    for name in cache.tensors:
        cached = model.tensors[f"past_key_values.{name}"]
        cache.tensors[name] = cached[:batch, :, : case.past].copy()
    positions = [_positions(sum(row), case.new, case.width) for row in case.mask]
    return model.graphs.run(
        graph,
        model.tokens[:batch, : case.new],
        cache,
        attention_mask=np.array(case.mask),
        position_ids=np.array(positions),
    )


def _check_refusal(case: Situation, message: str) -> None:
    names = [GUARD_NODE, "running GroupQueryAttention node"]
    if case.width < case.new:  # not even as wide as the new tokens: any node may stumble over it
        names.append("Non-zero status code returned while running")
    assert any(name in message for name in names), (case, message)


def _is_refused(model: Model, logits: NDArray[np.float32]) -> bool:
    """Whether a row was made NaN, which only the form for devices does, and to a row as a whole."""
    if not np.isnan(logits).any():
        return False
    assert model.graphs.manifest.target == "cuda"
    assert np.isnan(logits).all()
    return True


def _check_answer(
    model: Model, graph: str, case: Situation, outputs: dict[str, NDArray[Any]]
) -> None:
    for row, mask in enumerate(case.mask):
        if _is_refused(model, outputs["logits"][row]):
            continue
        valid = sum(mask)
        is_plain = case.width == case.past + case.new
        if model.graphs.manifest.target == "cuda" and graph == "decode":
            # No shape may meet a value there, so that a mask that ends early always means
            # buffers that are longer than the past.
            is_plain = is_plain and valid == case.width
        if is_plain:  # as any engine would take it
            past, seen = case.past, mask
        elif case.first_prompt:  # the cache is overwritten
            past, seen = 0, mask
        else:  # the cache is longer than the past, or than the mask
            past, seen = valid - case.new, (1,) * valid
            assert 0 <= past <= case.past, case
        expected = model.expected(row, past, case.new, seen)
        given = np.flatnonzero(seen[past:])
        found = outputs["logits"][row]
        if graph == "score":
            assert_agrees(found[given], expected[given], LIMIT)
        else:
            assert_agrees(found[0], expected[given[-1]], LIMIT)
        for layer, kind in enumerate(model.config.attention_layers):
            if kind == "local" and valid > case.past:
                continue  # it may have evicted the beginning
            for part in ("key", "value"):
                kept = outputs[f"present.{layer}.{part}"][row, :, :past]
                before = model.tensors[f"past_key_values.{layer}.{part}"][row, :, :past]
                assert (kept == before).all(), case


@pytest.mark.parametrize(
    ("graph", "new"),
    [("decode", 1)] + [(g, n) for g in ("prefill", "score") for n in range(1, LARGEST + 1)],
)
def test_every_situation(model: Model, graph: str, new: int) -> None:
    answered = 0
    for case in _situations(new):
        outcome = _run(model, graph, case)
        if isinstance(outcome, str):
            _check_refusal(case, outcome)
        else:
            _check_answer(model, graph, case, outcome)
            answered += not np.isnan(outcome["logits"]).any()
            if case.width <= case.past:  # the buffers have room
                outcome["logits"] = _run_in_place(model, graph, case)
                _check_answer(model, graph, case, outcome)
    assert answered >= 2


@pytest.mark.parametrize(
    ("graph", "new", "past", "mask"),
    [
        (
            "prefill",
            2,
            4,
            [[1, 1], [1, 0]],
        ),  # ragged first prompts into buffers
        ("prefill", 2, 4, [[1, 1, 1]]),  # a chunk: buffers longer than what is in use
        ("prefill", 2, 2, [[1, 1, 1, 1]]),  # a chunk behind a past of exactly that length
        ("score", 2, 4, [[1, 1, 1]]),
        ("decode", 1, 3, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        ("decode", 1, 4, [[1, 1, 0, 0], [1, 1, 1, 1]]),  # ragged rows, a mask of full length
        ("decode", 1, 4, [[1, 0, 0, 0], [1, 1, 0, 0]]),  # … from an empty past
    ],
)
def test_what_the_runtime_needs_is_answered(
    model: Model, graph: str, new: int, past: int, mask: list[list[int]]
) -> None:
    case = Situation(new, past, tuple(map(tuple, mask)))
    outcome = _run(model, graph, case)
    assert not isinstance(outcome, str), outcome
    assert not np.isnan(outcome["logits"]).any()
    _check_answer(model, graph, case, outcome)


@pytest.mark.parametrize(
    ("graph", "new", "past", "mask"),
    [
        ("prefill", 4, 0, [[1, 1, 1, 1]]),
        ("prefill", 4, 0, [[1, 1, 1, 0], [1, 0, 0, 0]]),
        ("decode", 1, 0, [[1], [1]]),
    ],
)
def test_window_caches_take_no_empty_buffers(
    model: Model, graph: str, new: int, past: int, mask: list[list[int]]
) -> None:
    case = Situation(new, past, tuple(map(tuple, mask)))
    outcome = _run(model, graph, case)
    if model.graphs.manifest.cache.window is None:
        assert not isinstance(outcome, str), outcome
        _check_answer(model, graph, case, outcome)
    else:
        assert isinstance(outcome, str)
        _check_refusal(case, outcome)


@pytest.mark.parametrize(
    ("graph", "new", "past", "mask"),
    [
        ("prefill", 4, 0, [[0, 1, 1, 1]]),  # left padding
        ("prefill", 4, 0, [[1, 1, 1, 1], [0, 0, 1, 1]]),
        ("prefill", 4, 0, [[1, 0, 1, 1]]),  # a hole
        ("prefill", 4, 0, [[0, 0, 0, 0]]),  # nothing at all
        ("prefill", 2, 2, [[1, 1, 1, 0]]),  # a new token that is padding, behind a past
        ("prefill", 2, 4, [[1, 0, 0]]),  # fewer valid positions than new tokens
        ("prefill", 1, 2, [[1, 1, 1, 1]]),  # more positions than past and new tokens make
        ("decode", 1, 3, [[0, 1, 1, 1]]),
        ("decode", 1, 3, [[1, 1, 1, 0]]),
        ("decode", 1, 4, [[0, 0, 0, 0]]),
    ],
)
def test_the_guard_names_itself(
    model: Model, graph: str, new: int, past: int, mask: list[list[int]]
) -> None:
    outcome = _run(model, graph, Situation(new, past, tuple(map(tuple, mask))))
    if model.graphs.manifest.target == "cuda" and not isinstance(outcome, str):
        refused = [np.isnan(row).all() for row in outcome["logits"]]
        assert refused == [
            list(row) != sorted(row, reverse=True)
            or not sum(row)
            or (1 < new < len(row) and 0 in row)
            or sum(row) > past + new
            for row in mask
        ]
        return
    assert isinstance(outcome, str)
    if model.graphs.manifest.target == "cuda":
        _check_refusal(Situation(new, past, tuple(map(tuple, mask))), outcome)
    else:
        assert GUARD_NODE in outcome


@pytest.mark.parametrize("fixture", ["mini_bundle", "portable_bundle"])
def test_any_number_but_zero_lets_through(fixture: str, request: pytest.FixtureRequest) -> None:
    """As in PyTorch, a mask is what it is as a boolean: 2 is no other position than 1."""
    graphs = Graphs(request.getfixturevalue(fixture))
    ids = np.arange(3, 8)[None]
    # The fused graphs want room for a local layer's window even without a past.
    ones, twos = (
        graphs.run("prefill", ids, graphs.cache(), attention_mask=np.full_like(ids, value))
        for value in (1, 2)
    )
    np.testing.assert_array_equal(ones, twos)
