"""Probes: the values in a graph that tools inspect, for the manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_runtime.bundle.manifest import ModelSpec, Probe

from neo_export.gpt_neo.model import place_name
from neo_export.passes.fold_bias import hidden_sums
from neo_export.passes.pack_qkv import PACKED_PLACE

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["probes_of"]


def probes_of(model: ir.Model, spec: ModelSpec) -> tuple[Probe, ...]:
    """The probes of all places, in the order of computation.

    Raises:
        AssertionError: a pass lost the name of a place.
    """
    names = {value.name for node in model.graph for value in node.outputs}
    names |= hidden_sums(model.graph).keys()
    probes = [Probe(layer=None, place="embedding", value=place_name(None, "embedding"))]
    for layer in range(spec.num_layers):
        packed = place_name(layer, PACKED_PLACE)
        for part, place in enumerate(("query", "key", "value")):
            if packed in names:
                channels = (part * spec.hidden_size, (part + 1) * spec.hidden_size)
                probes.append(Probe(layer=layer, place=place, value=packed, channels=channels))
            else:
                probes.append(Probe(layer=layer, place=place, value=place_name(layer, place)))
        probes += [
            Probe(layer=layer, place=place, value=place_name(layer, place))
            for place in ("attended", "attention", "mlp", "residual")
        ]
    probes.append(Probe(layer=None, place="final_norm", value=place_name(None, "final_norm")))
    lost = [probe.value for probe in probes if probe.value not in names]
    if lost:
        raise AssertionError(f"the passes lost the values {', '.join(lost)}")
    return tuple(probes)
