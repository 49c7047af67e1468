"""What it computes, at every length, is the subject of test_cache_parity.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.cache_steps import random_steps
from helpers.graphs import ALIKE, apply_pass, bound_graph, feeds, nodes_of, spec_of
from helpers.models import TinyConfig
from helpers.running import relative_l2, run_model
from neo_export.bundle.probes import probes_of
from neo_export.gpt_neo.graphs import GRAPH_NAMES
from neo_export.passes.fuse_attention import fuse_attention
from neo_export.passes.pack_qkv import pack_qkv
from neo_export.passes.quantize_cache import quantize_cache_steps
from neo_export.passes.window_caches import window_caches
from neo_export.quantize.kv_cache import CacheSteps, steps_from_ranges, stored_cache
from neo_runtime.errors import StatisticsError

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

CONFIG = TinyConfig(attention_layers=("local", "global", "local"), window_size=5)
LAYERS = len(CONFIG.attention_layers)
NEW = {"decode": 1, "prefill": 7, "score": 7}


def steps() -> CacheSteps:
    return random_steps(CONFIG)


def quantized(name: str, config: TinyConfig = CONFIG, *, packed: bool = True) -> ir.Model:
    model = bound_graph(name, config)
    for rewrite in (fuse_attention, pack_qkv(ALIKE), window_caches)[:: 1 if packed else 2]:
        apply_pass(rewrite, model)
    assert apply_pass(quantize_cache_steps(steps(), single=name == "decode"), model) == LAYERS
    return model


def cached(past: int, new: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Feeds with the same integers in the cache: as int8, and as the float32 that they stand for.

    The local layers' have room for every position, so that nothing is evicted.
    """
    full = feeds(CONFIG, batch=1, new=new, past=past)
    narrow, wide = dict(full), dict(full)
    generator = np.random.default_rng(past)
    for name in full:
        if name.startswith("past_key_values."):
            layer, part = name.split(".")[1:]
            step = getattr(steps(), part)[int(layer)].reshape(1, CONFIG.num_heads, 1, -1)
            shape = (1, CONFIG.num_heads, past, CONFIG.head_dim)
            integers = generator.integers(-30, 30, shape, dtype=np.int8)
            room = 0 if int(layer) == 1 else max(0, past + new, CONFIG.window_size) - past
            narrow[name] = np.pad(integers, [(0, 0), (0, 0), (0, room), (0, 0)])
            wide[name] = narrow[name].astype(np.float32) * step
    return narrow, wide


def rounding(model: ir.Model) -> ir.Model:
    """The float32 graph, with new keys and values rounded before they are attended to."""
    import onnx_ir as ir

    for node in nodes_of(model, "GroupQueryAttention"):
        packed, past = node.inputs[0], node.inputs[3]
        assert packed is not None
        assert past is not None
        layer = int(str(past.name).split(".")[1])
        ones = np.ones(CONFIG.hidden_size, np.float32)
        step = np.concatenate([ones, steps().key[layer], steps().value[layer]])
        lowest = np.repeat(np.array([-np.inf, -128, -128], np.float32), CONFIG.hidden_size)
        highest = np.repeat(np.array([np.inf, 127, 127], np.float32), CONFIG.hidden_size)
        is_query = np.repeat([True, False, False], CONFIG.hidden_size)

        def constant(name: str, array: Any, layer: int = layer) -> ir.Value:
            tensor = ir.tensor(array, name=f"test.{layer}.{name}")
            value = ir.Value(
                name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
            )
            value.const_value = tensor
            model.graph.register_initializer(value)
            return value

        divided = ir.node("Div", [packed, constant("step", step)])
        rounded = ir.node("Round", divided.outputs)
        least = ir.node("Max", [rounded.outputs[0], constant("lowest", lowest)])
        most = ir.node("Min", [least.outputs[0], constant("highest", highest)])
        scaled = ir.node("Mul", [most.outputs[0], constant("step again", step)])
        chosen = ir.node("Where", [constant("query", is_query), packed, scaled.outputs[0]])
        for index, new in enumerate((divided, rounded, least, most, scaled, chosen)):
            new.outputs[0].name = f"test.{layer}.value.{index}"
            model.graph.insert_before(node, new)
        node.replace_input_with(0, chosen.outputs[0])
    return model


@pytest.mark.parametrize("past", [0, 1, 4, 5, 12])
@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_as_float32_over_the_rounded_values(name: str, past: int) -> None:
    before = bound_graph(name, CONFIG)
    for rewrite in (fuse_attention, pack_qkv(ALIKE), window_caches):
        apply_pass(rewrite, before)
    narrow, wide = cached(past, NEW[name])
    expected, found = run_model(rounding(before), wide), run_model(quantized(name), narrow)
    assert relative_l2(found["logits"], expected["logits"]).max() <= 5e-6
    for layer in range(LAYERS):
        for part in ("key", "value"):
            present = found[f"present.{layer}.{part}"]
            assert present.dtype == np.int8
            step = getattr(steps(), part)[layer].reshape(1, CONFIG.num_heads, 1, -1)
            used = slice(0, past + NEW[name])
            difference = present * step - expected[f"present.{layer}.{part}"]
            assert np.abs(difference[:, :, used]).max() <= 1e-5


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_projections_that_are_not_packed(name: str) -> None:
    narrow, _ = cached(4, NEW[name])
    apart, together = quantized(name, packed=False), quantized(name)
    assert nodes_of(apart, "Concat")
    found, expected = run_model(apart, narrow)["logits"], run_model(together, narrow)["logits"]
    assert relative_l2(found, expected).max() <= 5e-6


def test_decode_reads_integers_and_prefill_widens_them() -> None:
    decode, prefill = quantized("decode"), quantized("prefill")
    for node in nodes_of(decode, "GroupQueryAttention"):
        assert node.attributes.get_string("k_quant_type") == "PER_TENSOR"
    assert not nodes_of(decode, "DequantizeLinear")
    assert len(nodes_of(prefill, "DequantizeLinear")) == 4 * LAYERS
    for model in (decode, prefill):
        for value in (*model.graph.inputs[3:], *model.graph.outputs[1:]):
            assert value.dtype is not None
            assert value.dtype.numpy() == np.int8


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_places_keep_their_names_and_values(name: str) -> None:
    before, after = bound_graph(name, CONFIG), quantized(name)
    for rewrite in (fuse_attention, pack_qkv(ALIKE), window_caches):
        apply_pass(rewrite, before)
    assert probes_of(after, spec_of(CONFIG)) == probes_of(before, spec_of(CONFIG))


def test_must_not_fire_on_standard_operators_nor_twice() -> None:
    rewrite = quantize_cache_steps(steps(), single=False)
    assert rewrite(bound_graph("prefill", CONFIG)) == 0
    assert rewrite(quantized("prefill")) == 0


def test_steps_reach_half_as_far_again_as_calibration_saw() -> None:
    largest = np.linspace(0, 3, CONFIG.hidden_size, dtype=np.float32)
    found = steps_from_ranges(lambda _place: largest, spec_of(CONFIG)).key[0]
    assert found[1:] * 127 == pytest.approx(1.5 * largest[1:])
    assert found[0] > 0, "a channel that was always 0"
    for nothing in (1e-44, 1e-40, 1e-31):
        largest[0] = nothing
        [step, *_] = steps_from_ranges(lambda _place: largest, spec_of(CONFIG)).key[0]
        assert np.isfinite(np.float32(1) / step)
    beyond = stored_cache(10 * largest, found)
    assert beyond[1:] == pytest.approx(1.5 * largest[1:])


@pytest.mark.parametrize(
    ("largest", "message"),
    [
        (np.ones(CONFIG.hidden_size - 8, np.float32), "another model"),
        (np.full(CONFIG.hidden_size, np.nan, np.float32), "not finite"),
        (np.full(CONFIG.hidden_size, -1, np.float32), "negative"),
    ],
)
def test_ranges_that_cannot_be(largest: NDArray[np.float32], message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        steps_from_ranges(lambda _place: largest, spec_of(CONFIG))
