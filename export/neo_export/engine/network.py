"""Parses the prefill graph into a TensorRT network and adds its optimization profiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neo_runtime.bundle.engine_record import DECODE_PROFILE, PREFILL_PROFILE
from neo_runtime.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from neo_runtime.bundle.engine_record import EngineOptions

    from neo_export.engine.flavour import Flavour

__all__ = ["ParsedGraph", "Shapes", "add_profiles", "parse_graph", "profile_shapes"]

_SHOWN = 20
_DECODE_LENGTHS = (1, 1, 2)
"""Minimum, optimum and maximum length of the decode profile.

With exactly one token of one sequence no dimension is dynamic: the builder then chooses another
weight layout, and the plan holds the weights twice (TensorRT for RTX 1.7, float16: 107 MB instead
of 57 MB for 53 MB of weights). With a maximum of two tokens both profiles share one copy."""

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Minimum, optimum and maximum shape of one input, as in `IOptimizationProfile.set_shape`."""


def parse_graph(flavour: Flavour, builder: Any, graph: Path) -> ParsedGraph:
    """Parse an ONNX file and its external weights into an `INetworkDefinition`.

    Raises:
        EngineError: the parser refuses it; the message lists the refused nodes with the parser's
            reasons.
    """
    trt = flavour.module
    # Precisions come from the graph. Newer versions have only such networks, and no flag.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, flavour.logger)
    parsed = parser.parse_from_file(str(graph))
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not parsed or errors:
        raise EngineError(_refusal(flavour, graph, errors))
    network.name = graph.stem
    _allow_decomposition(trt, network)
    return ParsedGraph(network, parser)


@dataclass(frozen=True)
class ParsedGraph:
    """A network, and the parser, which owns the weights that the network refers to."""

    network: Any
    parser: Any


def _refusal(flavour: Flavour, graph: Path, errors: list[Any]) -> str:
    lines = [
        f"node {error.node()} {error.node_name() or '(no name)'} "
        f"({error.node_operator() or 'graph'}): {error.desc().strip()}"
        for error in errors[:_SHOWN]
    ]
    if len(errors) > _SHOWN:
        lines.append(f"… and {len(errors) - _SHOWN} more")
    if not lines:
        lines = flavour.messages() or ["it gave no reason"]
    return (
        f"the parser of {flavour.product} {flavour.version} refuses {graph}; export the model "
        "again with --target tensorrt.\n  " + "\n  ".join(lines)
    )


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Let TensorRT decompose attention into matrix products and softmax.

    The graph's scores are float32. TensorRT has no fused attention kernel for them, and without
    this the build fails.
    """
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings return the base class
            layer.attention.decomposable = True


def add_profiles(builder: Any, config: Any, network: Any, options: EngineOptions) -> None:
    """Add the decode profile, then the prefill profile, over the network's inputs.

    Raises:
        EngineError: the builder refuses a profile.
    """
    for expected in (DECODE_PROFILE, PREFILL_PROFILE):
        profile = builder.create_optimization_profile()
        for name, shapes in _inputs(network, expected, options):
            profile.set_shape(name, *shapes)
        if config.add_optimization_profile(profile) != expected:
            raise EngineError(
                f"the builder refused optimization profile {expected}; report the bundle's "
                "configuration and the options of neo-engine"
            )


def _inputs(network: Any, profile: int, options: EngineOptions) -> Iterator[tuple[str, Shapes]]:
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        yield tensor.name, profile_shapes(tensor.name, tuple(tensor.shape), profile, options)


def profile_shapes(
    name: str, shape: tuple[int, ...], profile: int, options: EngineOptions
) -> Shapes:
    """Minimum, optimum and maximum shape of one input in one profile.

    In `shape`, −1 stands for the batch size at axis 0 and for a length at every other axis.
    """
    lengths = (options.min_length, options.opt_length, options.max_length)
    if name == "logit_positions":
        lengths = (1, 1, options.max_logit_positions)
    if profile == DECODE_PROFILE:
        lengths = (1, 1, 1) if name == "logit_positions" else _DECODE_LENGTHS
    batches = (options.min_batch, options.opt_batch, options.max_batch)
    smallest, best, largest = (
        tuple(
            size if size != -1 else batch if axis == 0 else length
            for axis, size in enumerate(shape)
        )
        for batch, length in zip(batches, lengths, strict=True)
    )
    return smallest, best, largest
