"""The places that tools look at exist in every graph, and hold what PyTorch holds there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from helpers.graphs import bound_graph, spec_of, value_named
from helpers.models import ODD_CONFIGS, Reference, TinyConfig, make_checkpoint, random_ids
from helpers.running import Graphs, relative_l2, run_bound, session_options
from neo_export.bundle.probes import probes_of
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.tolerances import TOLERANCES

if TYPE_CHECKING:
    from pathlib import Path

    from neo_runtime.bundle.manifest import Manifest
    from numpy.typing import NDArray

LAYER_PLACES = ("query", "key", "value", "attended", "attention", "mlp", "residual")
CONFIGS = ("plain", "head_size_12", "local_first")


def expected_places(layers: int) -> list[tuple[int | None, str]]:
    inner = [(layer, place) for layer in range(layers) for place in LAYER_PLACES]
    return [(None, "embedding"), *inner, (None, "final_norm")]


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyConfig, Path, Reference]:
    config = ODD_CONFIGS[request.param]
    folder = make_checkpoint(tmp_path_factory.mktemp("probes") / "checkpoint", config)
    return config, folder, Reference(folder)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_places(
    checkpoint: tuple[TinyConfig, Path, Reference], target: str, precision: str, tmp_path: Path
) -> None:
    config, folder, reference = checkpoint
    options = ExportOptions(target=target, precision=precision)
    export_bundle(str(folder), tmp_path / "bundle", options)
    graphs = Graphs(tmp_path / "bundle")
    probes = graphs.manifest.probes
    assert [(p.layer, p.place) for p in probes] == expected_places(len(config.attention_layers))
    for graph in graphs.manifest.graphs.values():
        model = onnx.load(str(tmp_path / "bundle" / graph.file), load_external_data=False)
        names = {name for node in model.graph.node for name in node.output}
        assert {probe.value for probe in probes} <= names, graph.file

    ids = random_ids(config, 1, config.max_position_embeddings)
    hidden = reference_places(reference, ids)
    outputs = probed(tmp_path / "bundle", graphs.manifest, ids)
    for probe in probes:
        value = outputs[probe.value]
        found = value if probe.channels is None else value[..., slice(*probe.channels)]
        expected = hidden[probe.layer, probe.place]
        assert found.shape == expected.shape, probe
        assert relative_l2(found, expected).max() <= TOLERANCES[precision].hidden, probe


def reference_places(
    reference: Reference, ids: NDArray[np.int64]
) -> dict[tuple[int | None, str], NDArray[np.float32]]:
    """What PyTorch's modules give, by the place's name."""
    transformer = reference.model.transformer
    modules = {(None, "embedding"): transformer.drop, (None, "final_norm"): transformer.ln_f}
    for layer, block in enumerate(transformer.h):
        attention = block.attn.attention
        modules |= {
            (layer, "query"): attention.q_proj,
            (layer, "key"): attention.k_proj,
            (layer, "value"): attention.v_proj,
            (layer, "attention"): attention.out_proj,
            (layer, "mlp"): block.mlp,
            (layer, "residual"): block,
        }
    seen: dict[tuple[int | None, str], NDArray[np.float32]] = {}

    def keep(place: tuple[int | None, str], output: Any) -> None:
        seen[place] = (output[0] if isinstance(output, tuple) else output).numpy()

    handles = [
        module.register_forward_hook(
            lambda _module, _inputs, output, place=place: keep(place, output)
        )
        for place, module in modules.items()
    ]
    handles += [
        block.attn.attention.out_proj.register_forward_pre_hook(
            lambda _module, inputs, layer=layer: keep((layer, "attended"), inputs[0])
        )
        for layer, block in enumerate(transformer.h)
    ]
    reference.logits(ids)
    for handle in handles:
        handle.remove()
    return seen


def probed(bundle: Path, manifest: Manifest, ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """The values of all probes, as outputs of the score graph."""
    model = ir.load(bundle / manifest.graphs["score"].file)
    names = list(dict.fromkeys(probe.value for probe in manifest.probes))
    for name in names:
        model.graph.outputs.append(value_named(model, name))
    ir.save(model, bundle / "probed.onnx")
    session = ort.InferenceSession(
        str(bundle / "probed.onnx"),
        session_options(optimize=True),
        providers=["CPUExecutionProvider"],
    )
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.ascontiguousarray(np.arange(ids.shape[1])[None]),
    }
    cache = Graphs(bundle).cache(length=ids.shape[1])
    return run_bound(session, inputs, cache, more=names)


@pytest.mark.parametrize("place", ["residual", "attention", "attended", "key"])
def test_a_lost_name_is_noticed(place: str) -> None:
    config = TinyConfig()
    model = bound_graph("score", config)
    value_named(model, f"transformer.h.1.{place}").name = "something_else"
    with pytest.raises(AssertionError, match=rf"lost.*transformer\.h\.1\.{place}"):
        probes_of(model, spec_of(config))
