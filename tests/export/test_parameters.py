"""The table of a layer's matrices, held against the checkpoint's and PyTorch's own."""

from __future__ import annotations

import pytest
from helpers.graphs import spec_of
from helpers.models import DEMO, TinyConfig
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.comparison.reference import LayeredReference
from neo_export.gpt_neo.parameters import (
    EMBEDDING,
    HEAD,
    HEAD_INPUT,
    LAYER_INPUTS,
    LAYER_MATRICES,
    POSITIONS,
    expected_shapes,
    head_name,
    input_place,
    parts_of_packed,
    place_in_packed,
    readers_of,
)

LAYER = "transformer.h.11"
QKV = tuple(f"{LAYER}.attn.attention.{part}_proj.weight" for part in "qkv")
PACKED = f"{LAYER}.attn.attention.qkv_proj.weight"


def test_they_are_the_matrices_of_the_checkpoint() -> None:
    config = TinyConfig(attention_layers=("global",))
    shapes = expected_shapes(spec_of(config))
    found = [name for name, shape in shapes.items() if ".h.0." in name and len(shape) == 2]
    assert [f"transformer.h.0.{matrix.weight}" for matrix in LAYER_MATRICES] == found
    for matrix in LAYER_MATRICES:
        assert (f"transformer.h.0.{matrix.module}.bias" in shapes) == matrix.has_bias


def test_they_are_linear_modules_of_pytorch() -> None:
    with open_checkpoint(DEMO) as checkpoint:
        block = LayeredReference(checkpoint).load_block(0)
    for matrix in LAYER_MATRICES:
        module = block.get_submodule(matrix.module)
        assert (module.bias is not None) == matrix.has_bias


def test_readers_and_inputs_are_inverse() -> None:
    for kind in LAYER_INPUTS:
        for name in readers_of(f"{LAYER}.{kind}"):
            assert input_place(name) == f"{LAYER}.{kind}"
    assert readers_of(f"{LAYER}.ln_1") == QKV
    assert input_place(PACKED) == f"{LAYER}.ln_1"
    assert input_place(EMBEDDING) == input_place(HEAD) == HEAD_INPUT


@pytest.mark.parametrize(
    "name",
    [POSITIONS, f"{LAYER}.ln_1.weight", f"{LAYER}.mlp.c_fc.bias", "h.0.mlp.c_fc.weight", ""],
)
def test_what_multiplies_nothing(name: str) -> None:
    with pytest.raises(ValueError, match="no matrix that multiplies activations"):
        input_place(name)


def test_packed_projections() -> None:
    assert [place_in_packed(name) for name in QKV] == [(PACKED, third) for third in range(3)]
    assert parts_of_packed(PACKED) == QKV
    others = [EMBEDDING, *(f"{LAYER}.{matrix.weight}" for matrix in LAYER_MATRICES[3:])]
    for name in others:
        assert place_in_packed(name) is None
        assert parts_of_packed(name) == (name,)


def test_the_head() -> None:
    assert (head_name(tied=True), head_name(tied=False)) == (EMBEDDING, HEAD)
