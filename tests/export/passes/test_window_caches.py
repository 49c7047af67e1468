"""What it computes, at every length, is the subject of test_parity.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.graphs import ALIKE, apply_pass, bound_graph, feeds, nodes_of, spec_of
from helpers.models import TinyConfig
from helpers.running import relative_l2, run_model
from neo_export.bundle.probes import probes_of
from neo_export.gpt_neo.graphs import GRAPH_NAMES
from neo_export.passes.fuse_attention import fuse_attention
from neo_export.passes.pack_qkv import pack_qkv
from neo_export.passes.window_caches import WINDOW_DIMENSION, window_caches

if TYPE_CHECKING:
    import onnx_ir as ir

CONFIG = TinyConfig(attention_layers=("local", "global", "local"), window_size=5)
LOCAL = 2


def fused(name: str, config: TinyConfig = CONFIG) -> ir.Model:
    """The graph that the pass works on."""
    model = bound_graph(name, config)
    apply_pass(fuse_attention, model)
    return model


@pytest.mark.parametrize("past", [1, 4, 5, 6, 12])
@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_same_logits_from_the_window_alone(name: str, past: int) -> None:
    before, after = fused(name), fused(name)
    assert apply_pass(window_caches, after) == LOCAL
    full = feeds(CONFIG, batch=1, new=1 if name == "decode" else 7, past=past)
    windowed = dict(full)
    for input_name, tensor in full.items():
        if input_name.startswith(("past_key_values.0", "past_key_values.2")):
            kept = tensor[:, :, -CONFIG.window_size :]
            room = CONFIG.window_size - kept.shape[2]
            windowed[input_name] = np.pad(kept, [(0, 0), (0, 0), (0, room), (0, 0)])
    expected, found = run_model(before, full), run_model(after, windowed)
    assert relative_l2(found["logits"], expected["logits"]).max() <= 5e-6
    kept = min(CONFIG.window_size, full["attention_mask"].shape[1])
    for layer in (0, 2):
        present = found[f"present.{layer}.key"]
        assert present.shape[2] == CONFIG.window_size
        newest = expected[f"present.{layer}.key"][:, :, -kept:]
        assert relative_l2(present[:, :, :kept], newest).max() <= 5e-6
    whole = relative_l2(found["present.1.key"], expected["present.1.key"])
    assert whole.max() <= 5e-6


def test_only_local_layers_change() -> None:
    model = fused("decode")
    apply_pass(window_caches, model)
    windowed = [
        node.attributes.get_int("sliding_window_cache", 0)
        for node in nodes_of(model, "GroupQueryAttention")
    ]
    assert windowed == [1, 0, 1]
    for values, whole in (
        (model.graph.inputs[3:], "past_sequence"),
        (model.graph.outputs[1:], "present_sequence"),
    ):
        lengths = [str(value.shape[2]) for value in values if value.shape is not None]
        # Keys and values.
        assert lengths == [*[WINDOW_DIMENSION] * 2, *[whole] * 2, *[WINDOW_DIMENSION] * 2]


def test_places_keep_their_names() -> None:
    before, after = fused("score"), fused("score")
    apply_pass(window_caches, after)
    assert probes_of(after, spec_of(CONFIG)) == probes_of(before, spec_of(CONFIG))


def test_survives_packing() -> None:
    model = fused("decode")
    apply_pass(window_caches, model)
    apply_pass(pack_qkv(ALIKE), model)
    windowed = [
        node.attributes.get_int("sliding_window_cache", 0)
        for node in nodes_of(model, "GroupQueryAttention")
    ]
    assert windowed == [1, 0, 1]


@pytest.mark.parametrize("head_dim", [16, 12])
def test_must_not_fire_where_no_layer_is_global_or_none_is_fused(head_dim: int) -> None:
    layers = ("local", "local") if head_dim == 16 else ("global", "local")
    model = fused("decode", TinyConfig(attention_layers=layers, head_dim=head_dim))
    assert window_caches(model) == 0
    for node in nodes_of(model, "GroupQueryAttention"):
        assert "sliding_window_cache" not in node.attributes
