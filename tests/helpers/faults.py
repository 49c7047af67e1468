"""Bundles with one deliberate fault in one layer at one place, drawn at random.

Some are exported from a checkpoint with a wrong weight; others are copies of a bundle with edited
graphs. `CHANGES` lists the faults; each states where `neo-diff` must find it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from helpers.dequantized import get_attribute, set_attribute
from helpers.models import TinyConfig
from neo_export.exporter import ExportOptions
from neo_export.targets import Quantization
from neo_runtime.bundle.engine_record import ENGINES_FOLDER
from neo_runtime.bundle.manifest import FileRecord, Manifest
from onnx import helper, numpy_helper
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

GRAPHS = ("prefill", "decode", "score")
Tensors = dict[str, "NDArray[np.float32]"]


@dataclass(frozen=True)
class Fault:
    """One fault, and where `neo-diff` must find it."""

    name: str
    layer: int | None
    places: tuple[str, ...]
    """Names that are all correct; the first is the usual one."""
    regions: tuple[str, ...] = ("everywhere",)
    graphs: tuple[str, ...] = GRAPHS
    weights: Callable[[Tensors], None] | None = None
    """Changes the checkpoint's tensors."""
    config: Callable[[dict[str, Any]], None] | None = None
    """Changes the checkpoint's configuration."""
    graph: Callable[[onnx.ModelProto], None] | None = None
    """Changes a graph."""


def spoiled_checkpoint(source: Path, folder: Path, fault: Fault) -> Path:
    """Copy a checkpoint with the fault's weights or configuration."""
    shutil.copytree(source, folder)
    if fault.config is not None:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        fault.config(config)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if fault.weights is not None:
        tensors = load_file(source / "model.safetensors")
        fault.weights(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def spoiled_bundle(source: Path, folder: Path, fault: Fault) -> Path:
    """Copy a bundle with the fault's graphs and a valid manifest, as if exported like that."""
    assert fault.graph is not None
    # Plans and kernels belong to the bundle they were built from.
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(ENGINES_FOLDER))
    manifest = Manifest.from_json((source / "neo.json").read_text(encoding="utf-8"))
    records = dict(manifest.files)
    for name in fault.graphs:
        path = folder / manifest.graphs[name].file
        model = onnx.load(str(path), load_external_data=False)
        before = model.SerializeToString()
        fault.graph(model)
        data = model.SerializeToString()
        assert data != before, f"{fault.name}: nothing to change in {name}"
        path.write_bytes(data)
        records[path.name] = FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / "neo.json").write_text(replace(manifest, files=records).to_json(), encoding="utf-8")
    return folder


# Wrong weights.


def _key(layer: int, name: str) -> str:
    part = "mlp" if name.startswith("c_") else "attn.attention"
    return f"transformer.h.{layer}.{name if name.startswith('ln') else f'{part}.{name}'}.weight"


PLACES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "attention",
    "c_fc": "mlp",
    "c_proj": "mlp",
    "ln_1": "ln_1",
    "ln_2": "mlp",
}
"""Weight → the place at which a fault in it shows."""


def wrong_matrix(layer: int, name: str, other: int) -> Fault:
    """A layer has another layer's weight."""

    def change(tensors: Tensors) -> None:
        tensors[_key(layer, name)] = tensors[_key(other, name)].copy()

    return Fault(f"{name} of layer {other}", layer, (PLACES[name],), weights=change)


def transposed(layer: int, name: str) -> Fault:
    """A square matrix is transposed."""

    def change(tensors: Tensors) -> None:
        tensors[_key(layer, name)] = tensors[_key(layer, name)].T.copy()

    return Fault(f"{name} transposed", layer, (PLACES[name],), weights=change)


def shuffled(layer: int, name: str, seed: int) -> Fault:
    """The outputs of a matrix, or the channels of a norm, are permuted."""

    def change(tensors: Tensors) -> None:
        key = _key(layer, name)
        order = np.random.default_rng(seed).permutation(len(tensors[key]))
        tensors[key] = tensors[key][order].copy()

    return Fault(f"{name} shuffled", layer, (PLACES[name],), weights=change)


def missing_bias(layer: int, name: str) -> Fault:
    """A bias is zero."""

    def change(tensors: Tensors) -> None:
        tensors[_key(layer, name).replace(".weight", ".bias")][:] = 0

    return Fault(f"{name} without bias", layer, (PLACES[name],), weights=change)


def swapped_layers(one: int, other: int) -> Fault:
    """Two layers are swapped."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"transformer.h.{one}.")]:
            partner = name.replace(f".h.{one}.", f".h.{other}.")
            tensors[name], tensors[partner] = tensors[partner], tensors[name]

    return Fault(f"layers {one} and {other} swapped", one, ("query",), weights=change)


def shifted_positions(by: int) -> Fault:
    """The position table starts at another row."""

    def change(tensors: Tensors) -> None:
        table = tensors["transformer.wpe.weight"]
        rows = np.clip(np.arange(len(table)) + by, 0, len(table) - 1)
        tensors["transformer.wpe.weight"] = table[rows].copy()

    return Fault(f"positions shifted by {by}", None, ("embedding",), weights=change)


def few_positions(start: int, stop: int) -> Fault:
    """Some rows of the position table are copies of the first."""

    def change(tensors: Tensors) -> None:
        tensors["transformer.wpe.weight"][start:stop] = tensors["transformer.wpe.weight"][0]

    return Fault("few positions", None, ("embedding",), ("past",), weights=change)


# Wrong graphs, for onnxruntime's fused attention.


def _attention(model: onnx.ModelProto, layer: int) -> onnx.NodeProto:
    nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    return nodes[layer]


def window_of(layer: int, size: int, usual: int, graphs: tuple[str, ...] = GRAPHS) -> Fault:
    """A local layer attends to another number of positions."""

    def change(model: onnx.ModelProto) -> None:
        node = _attention(model, layer)
        assert get_attribute(node, "local_window_size") == usual
        set_attribute(node, "local_window_size", size)

    first = "at" if size < usual else "past"
    name = f"window {size} in place of {usual}"
    return Fault(name, layer, ("attended",), (first,), graphs, graph=change)


def without_window(layers: tuple[int, ...]) -> Fault:
    """Local layers are exported as global ones."""

    def change(config: dict[str, Any]) -> None:
        kinds = list(config["attention_layers"])
        for layer in layers:
            assert kinds[layer] == "local"
            kinds[layer] = "global"
        config["attention_layers"] = kinds
        config["attention_types"] = [[[kind], 1] for kind in kinds]

    return Fault("no window", layers[0], ("attended",), ("past",), config=change)


def other_window(size: int, usual: int, layer: int) -> Fault:
    """Exported with another window in the configuration; `layer` is the first local one."""

    def change(config: dict[str, Any]) -> None:
        assert config["window_size"] == usual
        config["window_size"] = size

    first = "at" if size < usual else "past"
    return Fault(f"a window of {size}", layer, ("attended",), (first,), config=change)


def window_for_global(layer: int, size: int) -> Fault:
    """A global layer attends only to a window."""

    def change(model: onnx.ModelProto) -> None:
        set_attribute(_attention(model, layer), "local_window_size", size)

    return Fault("a window where none belongs", layer, ("attended",), ("past",), graph=change)


def scaled(layer: int, head_dim: int, graphs: tuple[str, ...] = GRAPHS) -> Fault:
    """Scores are divided by √d, as in other models."""

    def change(model: onnx.ModelProto) -> None:
        [scale] = [a for a in _attention(model, layer).attribute if a.name == "scale"]
        scale.f = head_dim**-0.5

    return Fault("scaled attention", layer, ("attended",), graphs=graphs, graph=change)


def other_norm(layer: int, other: int, graph: str) -> Fault:
    """In one graph, a layer's norm uses another layer's scale."""

    def change(model: onnx.ModelProto) -> None:
        name, wrong = (f"transformer.h.{index}.ln_1.weight" for index in (layer, other))
        [node] = [n for n in model.graph.node if name in n.input]
        node.input[list(node.input).index(name)] = wrong

    return Fault("another norm", layer, (PLACES["ln_1"],), graphs=(graph,), graph=change)


def _detour(model: onnx.ModelProto, name: str) -> str:
    """Rename a graph output where it is computed; the caller must compute the output from it."""
    [node] = [node for node in model.graph.node if name in node.output]
    node.output[list(node.output).index(name)] = f"{name}.right"
    return f"{name}.right"


def _constants(model: onnx.ModelProto, prefix: str, **values: Any) -> dict[str, str]:
    names = {label: f"{prefix}.{label}" for label in values}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array(value), names[label]) for label, value in values.items()
    )
    return names


def unwritten_slot(layer: int, slot: int) -> Fault:
    """Prefill leaves NaN in one slot of a layer's values."""

    def change(model: onnx.ModelProto) -> None:
        name = f"present.{layer}.value"
        right = _detour(model, name)
        c = _constants(
            model, name, axis=np.int64(2), zero=np.int64(0), one=np.int64(1), slot=np.int64(slot),
            axes=np.array([0, 1, 3]), nan=np.float32(np.nan),
        )  # fmt: skip
        for kind, inputs, output in (
            ("Shape", [right], "shape"),
            ("Gather", [f"{name}.shape", c["axis"]], "length"),
            ("Range", [c["zero"], f"{name}.length", c["one"]], "slots"),
            ("Equal", [f"{name}.slots", c["slot"]], "that"),
            ("Unsqueeze", [f"{name}.that", c["axes"]], "mask"),
        ):
            model.graph.node.append(helper.make_node(kind, inputs, [f"{name}.{output}"]))
        model.graph.node.append(
            helper.make_node("Where", [f"{name}.mask", c["nan"], right], [name])
        )

    return Fault("unwritten slot", layer, ("cached_value",), graphs=("prefill",), graph=change)


def other_rows() -> Fault:
    """The logits of every row of a batch but the first are negated, in prefill and decode."""

    def change(model: onnx.ModelProto) -> None:
        right = _detour(model, "logits")
        c = _constants(
            model, "rows", zero=np.array([0]), one=np.array([1]), axis=np.int64(0),
            plus=np.float32(1), minus=np.float32(-1), axes=np.array([2]),
        )  # fmt: skip
        for kind, inputs, output in (
            ("Slice", ["input_ids", c["zero"], c["one"], c["one"]], "first"),
            ("Mul", ["rows.first", c["zero"]], "zeros"),
            ("Add", ["rows.zeros", c["one"]], "ones"),
            ("CumSum", ["rows.ones", c["axis"]], "numbers"),
            ("Equal", ["rows.numbers", c["one"]], "that"),
            ("Where", ["rows.that", c["plus"], c["minus"]], "sign"),
            ("Unsqueeze", ["rows.sign", c["axes"]], "signs"),
        ):
            model.graph.node.append(helper.make_node(kind, inputs, [f"rows.{output}"]))
        model.graph.node.append(helper.make_node("Mul", [right, "rows.signs"], ["logits"]))

    graphs = ("prefill", "decode")
    return Fault("other rows", None, ("logits",), graphs=graphs, graph=change)


def late_cache(layer: int, part: str, graph: str) -> Fault:
    """A graph writes its cache one position too far.

    Inserted operators move every slot up by one before it is written.
    """

    def change(model: onnx.ModelProto) -> None:
        name = f"present.{layer}.{part}"
        right = _detour(model, name)
        c = _constants(model, name, start=[0], end=[-1], axes=[2], one=[1])
        inputs = [right, c["start"]]
        model.graph.node.extend(
            [
                helper.make_node("Slice", [*inputs, c["one"], c["axes"]], [f"{name}.first"]),
                helper.make_node("Slice", [*inputs, c["end"], c["axes"]], [f"{name}.rest"]),
                helper.make_node("Concat", [f"{name}.first", f"{name}.rest"], [name], axis=2),
            ]
        )

    place = f"cached_{part}"
    return Fault(
        f"{part} cache of {graph} late",
        layer,
        (place,),
        ("everywhere", "below", "at", "past"),
        (graph,),
        graph=change,
    )


# At random.

LOCAL, GLOBAL = (1, 3), (0, 2)
"""Layers of `CONFIG`."""
CONFIG = TinyConfig(
    attention_layers=("global", "local", "global", "local"), max_position_embeddings=48
)
EXPORTS = {
    "cpu-fp32": ExportOptions(),
    "cpu-int8": ExportOptions(precision="int8"),
    "cpu-int4": ExportOptions(precision="int4", quantization=Quantization(block_size=16)),
    "cpu-fp16": ExportOptions(precision="fp16"),
    "portable-fp32": ExportOptions(target="portable"),
}


def drawn(seed: int) -> tuple[str, Fault]:
    """A random export and a fault of random layer, place and kind."""
    generator = np.random.default_rng(seed)
    export = str(generator.choice(list(EXPORTS)))
    layer, other = (int(n) for n in generator.choice(4, 2, replace=False))
    matrix = str(generator.choice(list(PLACES)))
    square = str(generator.choice(["q_proj", "k_proj", "v_proj", "out_proj"]))
    biased = str(generator.choice(["out_proj", "c_fc", "c_proj"]))
    local, wide = int(generator.choice(LOCAL)), int(generator.choice(GLOBAL))
    some = generator.choice(GRAPHS, int(generator.integers(1, 4)), replace=False)
    graphs = tuple(sorted(map(str, some)))
    window = CONFIG.window_size
    weights = [
        lambda: wrong_matrix(layer, matrix, other),
        lambda: wrong_matrix(layer, matrix, other),
        lambda: transposed(layer, square),
        lambda: shuffled(layer, matrix, seed),
        lambda: missing_bias(layer, biased),
        lambda: swapped_layers(min(layer, other), max(layer, other)),
        lambda: shifted_positions(int(generator.choice([-1, 1]))),
        lambda: without_window((local,)),
        lambda: other_window(window + int(generator.choice([-1, 1])), window, LOCAL[0]),
    ]
    fused = [
        lambda: window_of(local, window - 1, window, graphs),
        lambda: window_for_global(wide, window),
        lambda: scaled(layer, CONFIG.head_dim, graphs),
        lambda: late_cache(
            layer, str(generator.choice(["key", "value"])), str(generator.choice(GRAPHS[:2]))
        ),
    ]
    kinds = weights + (fused if export.startswith("cpu") else [])
    return export, kinds[int(generator.integers(len(kinds)))]()
