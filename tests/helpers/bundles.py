"""Synthetic bundles of a few kilobytes: valid, except that their graphs compute nothing useful."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

import onnx
from neo_runtime.bundle.manifest import (
    CacheSpec,
    FileRecord,
    GraphSpec,
    Manifest,
    ModelSpec,
    Probe,
    TensorSpec,
)
from onnx import TensorProto, helper

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = 2
HEADS = 2
HEAD_DIM = 4
VOCABULARY = 11
LENGTH = 16
GRAPHS = ("prefill", "decode", "score")


def model_spec() -> ModelSpec:
    return ModelSpec(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=32,
        num_layers=LAYERS,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=LENGTH,
        window_size=4,
        attention_layers=("global", "local"),
        layer_norm_epsilon=1e-5,
        activation_function="gelu_new",
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=(0,),
        pad_token_id=None,
    )


def graph_spec(name: str) -> GraphSpec:
    cache = ("batch", HEADS, "length", HEAD_DIM)

    def tensors(prefix: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name=f"{prefix}.{i}.{kind}", dtype="float32", shape=cache)
            for i in range(LAYERS)
            for kind in ("key", "value")
        )

    ids = tuple(
        TensorSpec(name=n, dtype="int64", shape=("batch", "sequence"))
        for n in ("input_ids", "attention_mask", "position_ids")
    )
    logits = TensorSpec(name="logits", dtype="float32", shape=("batch", "rows", VOCABULARY))
    return GraphSpec(
        file=f"{name}.onnx",
        inputs=(*ids, *tensors("past_key_values")),
        outputs=(logits, *tensors("present")),
    )


def external_tensor(name: str, location: str, count: int = 4) -> TensorProto:
    """A float32 tensor [count] whose data is at the start of the file `location`."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[count])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(4 * count))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def graph_bytes(name: str, *initializers: TensorProto, nodes: tuple[Any, ...] = ()) -> bytes:
    """A serialized model with the inputs and outputs that the manifest declares."""
    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    spec = graph_spec(name)
    inputs, outputs = (
        [helper.make_tensor_value_info(t.name, types[t.dtype], t.shape) for t in side]
        for side in (spec.inputs, spec.outputs)
    )
    graph = helper.make_graph(list(nodes), name, inputs, outputs, list(initializers))
    model: onnx.ModelProto = helper.make_model(graph)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def record(path: Path) -> FileRecord:
    data = path.read_bytes()
    return FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def make_bundle(folder: Path, *, weights: bytes = bytes(range(64)), **changes: Any) -> Manifest:
    """Write a complete bundle to `folder` (created if missing), with `changes` to its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.bin").write_bytes(weights)
    for name in GRAPHS:
        initializer = external_tensor("transformer.wte.weight", "weights.bin")
        (folder / f"{name}.onnx").write_bytes(graph_bytes(name, initializer))
    (folder / "config.json").write_text('{"model_type": "gpt_neo"}\n')
    (folder / "tokenizer.json").write_text("{}\n")
    (folder / "engines").mkdir(exist_ok=True)
    (folder / "engines" / "old.plan").write_text("none\n")
    return rewrite_manifest(folder, **changes)


def rewrite_manifest(folder: Path, **changes: Any) -> Manifest:
    """Write a manifest of the files as they are now, as a forger would after altering one."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    manifest = Manifest(
        precision="fp32",
        target="cpu",
        max_length=LENGTH,
        model=model_spec(),
        cache=CacheSpec(layout="in_place", padding="right", dtype="float32"),
        graphs={name: graph_spec(name) for name in GRAPHS},
        probes=(Probe(layer=0, place="key", value="h.0.qkv", channels=(8, 16)),),
        files={name: record(folder / name) for name in names if name != "neo.json"},
        has_tokenizer=True,
        minimum_onnxruntime="1.17.0",
        tools={"onnx": "1.23.0"},
    )
    manifest = dataclasses.replace(manifest, **changes)
    (folder / "neo.json").write_text(manifest.to_json())
    return manifest


def edit_json(folder: Path, *keys: str | int, value: Any = None, delete: bool = False) -> None:
    """Set or delete one value of `neo.json` by its path of keys, and update the checksum."""
    path = folder / "neo.json"
    raw = json.loads(path.read_text())
    sealed = raw.pop("checksum", None) is not None
    place = raw
    for key in keys[:-1]:
        place = place[key]
    if delete:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    if sealed:
        text = json.dumps(raw, indent=1, sort_keys=True, ensure_ascii=False)
        raw["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(raw))
