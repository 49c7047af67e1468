"""In-memory portable graphs of tiny models, with inputs, for tests of single passes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from helpers.models import TinyConfig, deviation, random_ids
from helpers.running import run_model
from neo_export.bundle.weights import bind_parameters
from neo_export.gpt_neo.graphs import build_graph
from neo_export.gpt_neo.parameters import expected_shapes
from neo_export.quantize.plan import WeightPlan
from neo_export.targets import TARGETS, PassContext, Quantization
from neo_runtime.bundle.manifest import ModelSpec
from onnx_ir.passes.common import RemoveUnusedNodesPass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from neo_export.passes import Pass
    from numpy.typing import NDArray


ALIKE = WeightPlan.uniform("fp32")
"""A plan that stores every matrix in one way."""


def spec_of(config: TinyConfig) -> ModelSpec:
    return ModelSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size or 4 * config.hidden_size,
        num_layers=len(config.attention_layers),
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        window_size=config.window_size,
        attention_layers=config.attention_layers,
        layer_norm_epsilon=config.layer_norm_epsilon,
        activation_function="gelu_new",
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=0,
        eos_token_id=(0,),
        pad_token_id=None,
    )


def random_parameters(config: TinyConfig, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random parameters as `helpers.models.make_checkpoint` draws them, without PyTorch."""
    generator = np.random.default_rng(seed)
    parameters = {}
    for name, shape in expected_shapes(spec_of(config)).items():
        mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
        values = generator.normal(mean, deviation(name, shape, config), shape)
        parameters[name] = values.astype(np.float32)
    return parameters


def passes_of(
    target: str, precision: str, graph: str, spec: ModelSpec, **decided: Any
) -> list[Pass]:
    """What an export without options applies; `decided` are other fields of the context."""
    found = TARGETS[target]
    context = PassContext(
        graph=graph,
        precision=precision,
        spec=spec,
        plan=found.plan_for(Quantization(), graph, precision, spec),
        cache=found.cache(spec, precision, spec.max_position_embeddings),
        max_length=spec.max_position_embeddings,
        **decided,
    )
    return found.passes(context)


def stored_tensors(models: Mapping[str, ir.Model]) -> int:
    """Number of distinct tensors of all graphs in the weight file."""
    values = [value for model in models.values() for value in model.graph.initializers.values()]
    tensors = [value.const_value for value in values]
    return len({tensor.offset for tensor in tensors if isinstance(tensor, ir.ExternalTensor)})


def bound_graph(
    name: str, config: TinyConfig, parameters: dict[str, NDArray[np.float32]] | None = None
) -> ir.Model:
    """The portable graph `name` with the given parameters, or random ones."""
    model = build_graph(name, spec_of(config))
    bind_parameters(model, (parameters or random_parameters(config)).__getitem__)
    return model


def feeds(config: TinyConfig, *, batch: int, new: int, past: int) -> dict[str, NDArray[Any]]:
    """Inputs without padding: `past` random cached positions, `new` random tokens."""
    generator = np.random.default_rng(3)
    shape = (batch, config.num_heads, past, config.head_dim)
    inputs: dict[str, NDArray[Any]] = {
        "input_ids": random_ids(config, batch, new),
        "attention_mask": np.ones((batch, past + new), dtype=np.int64),
        "position_ids": np.tile(np.arange(past, past + new), (batch, 1)),
    }
    for layer in range(len(config.attention_layers)):
        for part in ("key", "value"):
            tensor = generator.normal(size=shape).astype(np.float32)
            inputs[f"past_key_values.{layer}.{part}"] = tensor
    return inputs


def situations(graph: str, config: TinyConfig) -> list[dict[str, NDArray[Any]]]:
    """Feeds valid for fused graphs too: a batch of first prompts, a chunk, single tokens."""
    longer = config.window_size + 3
    if graph == "decode":
        return [
            feeds(config, batch=2, new=1, past=0),
            feeds(config, batch=2, new=1, past=longer),
        ]
    return [
        feeds(config, batch=2, new=longer, past=0),
        feeds(config, batch=1, new=longer, past=3),
    ]


def operators(model: ir.Model) -> Counter[str]:
    """Number of nodes of each operator type."""
    return Counter(node.op_type for node in model.graph)


def nodes_of(model: ir.Model, operator: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == operator]


def value_named(model: ir.Model, name: str) -> ir.Value:
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def through_identity(model: ir.Model, node: ir.Node, index: int) -> None:
    """Replace an input of `node` by a computed copy of it."""
    source = node.inputs[index]
    assert source is not None
    copy = ir.node("Identity", [source])
    copy.outputs[0].shape, copy.outputs[0].type = source.shape, source.type
    copy.outputs[0].name = f"{source.name}.copy"
    model.graph.insert_before(node, copy)
    node.replace_input_with(index, copy.outputs[0])


def apply_pass(rewrite: Callable[[ir.Model], int], model: ir.Model) -> int:
    """Apply a pass as the exporter does: then remove unused nodes."""
    fired = rewrite(model)
    RemoveUnusedNodesPass()(model)
    return fired


def assert_same_outputs(
    before: ir.Model, after: ir.Model, inputs: list[dict[str, NDArray[Any]]], limit: float
) -> None:
    """Assert that every output, logits and cache, is within `limit` per position (relative L2)."""
    for each in inputs:
        expected, found = run_model(before, each), run_model(after, each)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].shape == value.shape, name
            norm = np.linalg.norm(value, axis=-1)
            error = np.linalg.norm(found[name] - value, axis=-1) / norm
            assert error.max() <= limit, (name, error.max())
