"""Quantized bundles through the runtime: rows on their own, threads, text, and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import neo_runtime
import numpy as np
import pytest
from helpers.dequantized import dequantized_checkpoint
from helpers.held_out import held_out_ids, perplexity
from helpers.models import DEMO, Reference
from helpers.outliers import outlier_checkpoint
from helpers.running import relative_l2
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.quantize.plan import Storage, WeightPlan
from neo_export.targets import Quantization
from neo_export.tolerances import TOLERANCES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from neo_runtime import Model
    from numpy.typing import NDArray

PROMPTS = (200, 1, 64, 30)
"""Tokens of each: around the window (64), and as little as possible."""
STEPS = 20
MIXED = WeightPlan(
    Storage("int4", 32),
    (
        ("transformer.wte.weight", Storage("int8")),
        ("transformer.h.0.attn.attention.k_proj.weight", Storage("int8")),
        ("transformer.h.1.mlp.c_proj.weight", Storage("fp32")),
        ("transformer.h.2.mlp.c_fc.weight", Storage("int4", 64)),
    ),
)
VARIANTS = {
    "int8": ("int8", Quantization()),
    "int4-32": ("int4", Quantization(block_size=32)),
    "int4-64": ("int4", Quantization(block_size=64)),
    "mixed": ("mixed", Quantization(plan=MIXED)),
    "int4-int8": ("int4", Quantization(block_size=32, int8_prefill=True)),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def bundle(variant: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    precision, quantization = VARIANTS[variant]
    folder = tmp_path_factory.mktemp(variant) / "bundle"
    export_bundle(str(DEMO), folder, ExportOptions(precision=precision, quantization=quantization))
    return folder


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[Model]:
    with neo_runtime.load(bundle, threads=1) as loaded:
        yield loaded


def continued(model: Model, rows: list[int]) -> NDArray[np.float32]:
    """Logits [1 + STEPS, rows, V] of these rows together: their prompts, then their own text."""
    text = held_out_ids(len(PROMPTS), 256)
    cache = model.new_cache(len(rows), 256)
    found = [model.prefill(cache, [text[row, : PROMPTS[row]] for row in rows]).copy()]
    for step in range(STEPS):
        tokens = [int(text[row, PROMPTS[row] + step]) for row in rows]
        found.append(model.decode(cache, tokens).copy())
    return np.stack(found)


def test_a_row_does_not_depend_on_its_neighbours(variant: str, model: Model) -> None:
    """Nor on padding. int8 to the last bit: each row has a scale of its own.

    onnxruntime's int4 kernels sum a row's blocks in an order that depends on how many rows there
    are. Nearly always the logits agree to float32 rounding; but the last bit may decide to which
    of two integers an activation is rounded in a later layer, which is then seen as an error of
    the size that rounding has.
    """
    rows = list(range(len(PROMPTS)))
    together = continued(model, rows)
    alone = np.concatenate([continued(model, [row]) for row in rows], axis=1)
    if variant == "int8":
        assert np.array_equal(together, alone)
        return
    difference = relative_l2(together, alone)
    assert np.median(difference) <= TOLERANCES["fp32"].logits
    assert difference.max() <= TOLERANCES["int4"].logits


def test_threads_do_not_change_the_logits(bundle: Path, model: Model) -> None:
    with neo_runtime.load(bundle, threads=2) as more:
        assert np.array_equal(continued(more, [0, 1, 2, 3]), continued(model, [0, 1, 2, 3]))


@pytest.mark.parametrize("variant", ["int8"], indirect=True)
def test_prompts_in_a_batch_continue_as_alone(model: Model) -> None:
    """With int4 a near tie between two tokens may fall either way: see the logits above."""
    text = held_out_ids(4, 256)
    prompts = [text[row, :count].tolist() for row, count in enumerate(PROMPTS)]
    options = {"max_new_tokens": 60, "ignore_eos": True}
    together = model.generate(prompts, **options)
    alone = [model.generate(prompt, **options) for prompt in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    sampled = model.generate(prompts, **options, do_sample=True, seed=(1, 2, 3, 4))
    alone = [
        model.generate(prompt, **options, do_sample=True, seed=seed)
        for seed, prompt in enumerate(prompts, start=1)
    ]
    assert [c.token_ids for c in sampled] == [c.token_ids for c in alone]


@pytest.mark.parametrize("variant", ["int8", "int4-32", "int4-64", "mixed"], indirect=True)
def test_logits_are_those_of_the_dequantized_weights(
    variant: str, model: Model, tmp_path: Path
) -> None:
    """Ragged prompts in chunks, then decode: each position against PyTorch."""
    precision, quantization = VARIANTS[variant]
    reference = Reference(
        dequantized_checkpoint(DEMO, tmp_path / "read-back", precision, quantization)
    )
    text = held_out_ids(len(PROMPTS), 256)
    expected = reference.logits(text)
    found = continued(model, list(range(len(PROMPTS))))
    limit = TOLERANCES[precision]
    assert limit.typical is not None
    errors = np.stack(
        [
            relative_l2(found[:, row], expected[row, count - 1 : count + STEPS])
            for row, count in enumerate(PROMPTS)
        ]
    )
    assert errors.max() <= limit.logits
    assert np.median(errors) <= limit.typical


def test_int8_prefill_is_that_of_an_int8_bundle(tmp_path: Path) -> None:
    """And its decode that of an int4 one: the cache is the same for both."""
    bundles = {}
    for name, (precision, quantization) in VARIANTS.items():
        options = ExportOptions(precision=precision, quantization=quantization)
        export_bundle(str(DEMO), tmp_path / name, options)
        bundles[name] = neo_runtime.load(tmp_path / name, threads=1)
    ids = held_out_ids(1, 64)[0]
    both, int8, int4 = (bundles[name] for name in ("int4-int8", "int8", "int4-32"))
    assert np.array_equal(both.logits(ids), int8.logits(ids))
    caches = [model.new_cache(1, 64) for model in (both, int8, int4)]
    prompts = [
        model.prefill(cache, [ids[:1]]).copy()
        for model, cache in zip((both, int8, int4), caches, strict=True)
    ]
    assert np.array_equal(prompts[0], prompts[1])
    assert not np.array_equal(prompts[0], prompts[2])
    fresh = [model.new_cache(1, 64) for model in (both, int4)]
    assert np.array_equal(both.decode(fresh[0], ids[:1]), int4.decode(fresh[1], ids[:1]))


LOSS = {"int8": 0.002, "int4-32": 0.03, "int4-64": 0.045, "mixed": 0.012, "int4-int8": 0.002}
"""Largest rise of the held-out perplexity. Measured over 24 pieces (mixed: 8): 0.0013, 0.0281,
0.0374, 0.0091 and, as scoring reads the int8 copy, 0.0013."""


def test_perplexity(variant: str, model: Model, reference: Reference) -> None:
    """PyTorch's, in float32 and on the original weights, is hardly left."""
    # The small loss of int8 is seen on few pieces; int4's needs all to be the published one.
    pieces = held_out_ids(24, 512) if variant == "int4-32" else held_out_ids(8, 512)
    full = perplexity(lambda ids: reference.logits(ids[None])[0], pieces)
    loss = perplexity(model.logits, pieces) / full - 1
    assert loss <= LOSS[variant]
    assert loss > 1e-4, "quantized weights that lose nothing would not be quantized"


def test_outlier_checkpoint_is_the_same_function(reference: Reference, tmp_path: Path) -> None:
    """What each precision loses on it is reported in the docs; PyTorch loses nothing."""
    outliers = Reference(outlier_checkpoint(DEMO, tmp_path / "outliers"))
    ids = held_out_ids(2, 512)
    expected = reference.logits(ids)
    assert relative_l2(outliers.logits(ids), expected).max() <= TOLERANCES["fp32"].logits
    name = "transformer.h.0.ln_1.weight"
    ratio = outliers.parameter(name) / reference.parameter(name)
    assert np.isclose(ratio, 50).sum() == 4
    assert np.isclose(ratio, 1).sum() == len(ratio) - 4
    export_bundle(str(tmp_path / "outliers"), tmp_path / "fp32")
    with neo_runtime.load(tmp_path / "fp32", threads=1) as model:
        assert relative_l2(model.logits(ids[0]), expected[0]).max() <= TOLERANCES["fp32"].logits
