"""GPT-Neo's parameters by their names in the checkpoint: shapes, each matrix's input and output.

Inputs and outputs are places: values that tools inspect, named `transformer.h.{i}.PLACE`
(`neo_export.gpt_neo.model`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from neo_runtime.bundle.manifest import ModelSpec

__all__ = [
    "EMBEDDING",
    "HEAD",
    "HEAD_INPUT",
    "LAYER_INPUTS",
    "LAYER_MATRICES",
    "POSITIONS",
    "PROJECTIONS",
    "LayerMatrix",
    "ReadParameter",
    "expected_shapes",
    "full_name",
    "head_name",
    "input_place",
    "parts_of_packed",
    "place_in_packed",
    "readers_of",
]

EMBEDDING = "transformer.wte.weight"
POSITIONS = "transformer.wpe.weight"
HEAD = "lm_head.weight"
_PARENTS = ("transformer.", "lm_head.")
HEAD_INPUT = "transformer.final_norm"
"""The place that is the head's input."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""Attention's matrices that may be packed into one matrix, stacked by rows in this order."""

ReadParameter = Callable[[str], NDArray[np.float32]]
"""Name of a parameter → its values, memory-mapped where possible."""

_PACKED = "qkv_proj"
_OF_LAYER = re.compile(r"(transformer\.h\.\d+)\.(.+)")


@dataclass(frozen=True)
class LayerMatrix:
    """A weight matrix that every layer has."""

    module: str
    """Name of its linear module within the layer."""
    reads: str
    """The place that is its input."""
    gives: str
    """The place that is its output, bias included."""
    has_bias: bool = True

    @property
    def weight(self) -> str:
        """Name of the matrix within the layer."""
        return f"{self.module}.weight"


LAYER_MATRICES = (
    LayerMatrix("attn.attention.q_proj", "ln_1", "query", has_bias=False),
    LayerMatrix("attn.attention.k_proj", "ln_1", "key", has_bias=False),
    LayerMatrix("attn.attention.v_proj", "ln_1", "value", has_bias=False),
    LayerMatrix("attn.attention.out_proj", "attended", "attention"),
    LayerMatrix("mlp.c_fc", "ln_2", "c_fc"),
    LayerMatrix("mlp.c_proj", "gelu", "mlp"),
)
"""In the order of computation."""

LAYER_INPUTS = tuple(dict.fromkeys(matrix.reads for matrix in LAYER_MATRICES))
"""Places of a layer that are inputs of matrices, in the order of computation."""


def full_name(name: str) -> str:
    """A tensor's name in `GPTNeoForCausalLM`, given that name or the one in `GPTNeoModel`."""
    return name if name.startswith(_PARENTS) else f"transformer.{name}"


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of `GPTNeoForCausalLM`, in the order of its layers."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (spec.vocab_size, hidden),
        POSITIONS: (spec.max_position_embeddings, hidden),
    }
    for i in range(spec.num_layers):
        layer = f"transformer.h.{i}"
        shapes |= {
            f"{layer}.ln_1.weight": (hidden,),
            f"{layer}.ln_1.bias": (hidden,),
            f"{layer}.attn.attention.q_proj.weight": (hidden, hidden),
            f"{layer}.attn.attention.k_proj.weight": (hidden, hidden),
            f"{layer}.attn.attention.v_proj.weight": (hidden, hidden),
            f"{layer}.attn.attention.out_proj.weight": (hidden, hidden),
            f"{layer}.attn.attention.out_proj.bias": (hidden,),
            f"{layer}.ln_2.weight": (hidden,),
            f"{layer}.ln_2.bias": (hidden,),
            f"{layer}.mlp.c_fc.weight": (inner, hidden),
            f"{layer}.mlp.c_fc.bias": (inner,),
            f"{layer}.mlp.c_proj.weight": (hidden, inner),
            f"{layer}.mlp.c_proj.bias": (hidden,),
        }
    shapes["transformer.ln_f.weight"] = (hidden,)
    shapes["transformer.ln_f.bias"] = (hidden,)
    if not spec.tie_word_embeddings:
        shapes[HEAD] = (spec.vocab_size, hidden)
    return shapes


def head_name(*, tied: bool) -> str:
    """Name of the matrix that produces the logits: a tied head is the embedding."""
    return EMBEDDING if tied else HEAD


def input_place(name: str) -> str:
    """The place that is the input of a matrix.

    Args:
        name: a matrix's name in the checkpoint, such as "transformer.h.3.mlp.c_fc.weight", or the
            name of a packed matrix; the embedding counts as the (tied) head.

    Raises:
        ValueError: no matrix of that name multiplies activations.
    """
    if name in (EMBEDDING, HEAD):
        return HEAD_INPUT
    match = _OF_LAYER.fullmatch(parts_of_packed(name)[0])
    place = next((m.reads for m in LAYER_MATRICES if match and m.weight == match[2]), None)
    if match is None or place is None:
        raise ValueError(f"{name!r} is no matrix that multiplies activations")
    return f"{match[1]}.{place}"


def readers_of(place: str) -> tuple[str, ...]:
    """Names of the matrices that read a place of a layer, such as "transformer.h.3.ln_1"."""
    layer, _, kind = place.rpartition(".")
    return tuple(f"{layer}.{matrix.weight}" for matrix in LAYER_MATRICES if matrix.reads == kind)


def place_in_packed(name: str) -> tuple[str, int] | None:
    """Where a query, key or value projection is in the packed matrix of its layer.

    Args:
        name: the checkpoint's name of any matrix.

    Returns:
        Name of the packed matrix, and which third of its rows; None for a matrix that is never
        packed.
    """
    for third, part in enumerate(PROJECTIONS):
        if f".{part}." in name:
            return name.replace(part, _PACKED), third
    return None


def parts_of_packed(name: str) -> tuple[str, ...]:
    """Names of the three projections in a packed matrix; any other name is returned unchanged."""
    if f".{_PACKED}." not in name:
        return (name,)
    return tuple(name.replace(_PACKED, part) for part in PROJECTIONS)
