"""Builds the graphs of a bundle, applies their passes, and describes them for the manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neo_runtime.bundle.manifest import GraphSpec, TensorSpec
from onnx_ir.passes.common import RemoveUnusedNodesPass

from neo_export.bundle.weights import bind_parameters, sort_initializers
from neo_export.gpt_neo.graphs import build_graph, drop_builder_notes

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from neo_export.decisions.prepared import Prepared

__all__ = ["GraphSummary", "PassSummary", "build_graphs", "graph_spec"]


@dataclass(frozen=True)
class PassSummary:
    """The effect of one pass on one graph."""

    name: str
    fired: int
    nodes: int
    """Number of nodes in the graph after the pass."""


@dataclass(frozen=True)
class GraphSummary:
    """One graph, from its portable form to its file."""

    name: str
    bytes: int
    nodes_before: int
    passes: tuple[PassSummary, ...]
    operators: dict[str, int]


def build_graphs(
    prepared: Prepared,
) -> tuple[dict[str, ir.Model], dict[str, Callable[[int], GraphSummary]]]:
    """Build every graph of the bundle; weights are read lazily, when they are written.

    Returns:
        The graphs by name, and for each a function from its size on disk in bytes to its summary.
    """
    models, summaries = {}, {}
    for name, entry in prepared.target.graphs:
        model = build_graph(entry, prepared.spec)
        bind_parameters(model, prepared.read)
        before, steps = len(model.graph), []
        for rewrite in prepared.passes(name):
            fired = rewrite(model)
            RemoveUnusedNodesPass()(model)
            steps.append(PassSummary(rewrite.__name__, fired, len(model.graph)))
        RemoveUnusedNodesPass()(model)
        drop_builder_notes(model.graph)
        sort_initializers(model.graph)
        operators = dict(sorted(Counter(node.op_type for node in model.graph).items()))
        models[name] = model
        summaries[name] = _summarize(name, before, tuple(steps), operators)
    return models, summaries


def _summarize(
    name: str, before: int, steps: tuple[PassSummary, ...], operators: dict[str, int]
) -> Callable[[int], GraphSummary]:
    return lambda size: GraphSummary(name, size, before, steps, operators)


def graph_spec(name: str, model: ir.Model) -> GraphSpec:
    """A graph's inputs and outputs, for the manifest."""
    return GraphSpec(
        file=f"{name}.onnx",
        inputs=tuple(_tensor_spec(value) for value in model.graph.inputs),
        outputs=tuple(_tensor_spec(value) for value in model.graph.outputs),
    )


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    shape = tuple(n if isinstance(n, int) else str(n.value) for n in value.shape)
    return TensorSpec(name=value.name, dtype=str(value.dtype.numpy()), shape=shape)
