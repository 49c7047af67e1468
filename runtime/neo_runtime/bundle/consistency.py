"""Check that a manifest is consistent, and that this runtime supports what it describes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from neo_runtime.bundle.manifest import MANIFEST_NAME, WEIGHTS_NAME
from neo_runtime.errors import BundleDamagedError, BundleUnsupportedError
from neo_runtime.machine.installation import version_numbers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from neo_runtime.bundle.manifest import GraphSpec, Manifest, TensorSpec

__all__ = ["GRAPHS", "PRECISIONS", "TARGETS", "check_manifest"]

GRAPHS = ("prefill", "decode", "score")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "fp8", "mixed")
TARGETS = ("cpu", "cuda", "portable", "tensorrt")
_ATTENTION_LAYERS = ("global", "local")
_CACHE_DTYPES = ("float32", "float16", "bfloat16", "int8")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_manifest(manifest: Manifest, source: str) -> None:
    """Check a manifest without reading other files.

    Args:
        manifest: the parsed manifest.
        source: name of its file, for errors.

    Raises:
        BundleDamagedError: two fields contradict each other, or a value is out of range.
        BundleUnsupportedError: this runtime does not know the target or precision.
    """
    for what, found, known in (
        ("target", manifest.target, TARGETS),
        ("precision", manifest.precision, PRECISIONS),
    ):
        if found not in known:
            raise BundleUnsupportedError(
                f"{source}: {what} is {found!r}, but this neo_runtime supports only "
                f"{', '.join(known)}; upgrade neo-onnx, or export the bundle again"
            )
    for problem in _problems(manifest):
        raise BundleDamagedError(f"{source}: {problem}; export the bundle again")


def _problems(manifest: Manifest) -> Iterator[str]:
    yield from _model_problems(manifest)
    yield from _file_problems(manifest)
    for name in _graphs_of(manifest):
        if name not in manifest.graphs:
            yield f"graph {name!r} is missing; found {', '.join(sorted(manifest.graphs)) or 'none'}"
    for name, graph in manifest.graphs.items():
        if name in GRAPHS:
            yield from _graph_problems(name, graph, manifest)
    try:
        version_numbers(manifest.minimum_onnxruntime)
    except ValueError as error:
        yield f"minimum_onnxruntime: {error}"


def _graphs_of(manifest: Manifest) -> tuple[str, ...]:
    """The graphs that a bundle must have; with a static cache, "prefill" also scores."""
    static = manifest.cache.layout == "static"
    return tuple(name for name in GRAPHS if name != "score" or not static)


def _model_problems(manifest: Manifest) -> Iterator[str]:
    model = manifest.model
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "head_dim",
        "max_position_embeddings",
        "window_size",
        "layer_norm_epsilon",
    ):
        if not getattr(model, name) > 0:
            yield f"model.{name} is {getattr(model, name)}, expected more than 0"
    if model.num_heads * model.head_dim != model.hidden_size:
        yield (
            f"model.num_heads × model.head_dim is {model.num_heads} × {model.head_dim}, expected "
            f"model.hidden_size, {model.hidden_size}"
        )
    if len(model.attention_layers) != model.num_layers:
        yield (
            f"model.attention_layers has {len(model.attention_layers)} entries, expected "
            f"model.num_layers, {model.num_layers}"
        )
    for kind in model.attention_layers:
        if kind not in _ATTENTION_LAYERS:
            yield f"model.attention_layers has {kind!r}, expected 'global' or 'local'"
    if not 0 < manifest.max_length <= model.max_position_embeddings:
        yield (
            f"max_length is {manifest.max_length}, expected 1 to max_position_embeddings, "
            f"{model.max_position_embeddings}"
        )
    if manifest.cache.dtype not in _CACHE_DTYPES:
        yield f"cache.dtype is {manifest.cache.dtype!r}, expected {' or '.join(_CACHE_DTYPES)}"
    if manifest.cache.window is not None and manifest.cache.window <= 0:
        yield f"cache.window is {manifest.cache.window}, expected more than 0, or null"


def _file_problems(manifest: Manifest) -> Iterator[str]:
    if WEIGHTS_NAME not in manifest.files:
        yield f"files has no entry for {WEIGHTS_NAME}"
    if MANIFEST_NAME in manifest.files:
        yield f"files lists {MANIFEST_NAME}, which cannot contain its own checksum"
    for name, record in manifest.files.items():
        if record.size < 0 or not _SHA256.fullmatch(record.sha256):
            yield (
                f"files[{name!r}] has size {record.size} and sha256 {record.sha256!r}, expected at "
                "least 0 and 64 hex digits"
            )
    for name, graph in manifest.graphs.items():
        if graph.file not in manifest.files:
            yield f"the file of graph {name!r}, {graph.file!r}, is not in files"


def _graph_problems(name: str, graph: GraphSpec, manifest: Manifest) -> Iterator[str]:
    """Differences from the inputs and outputs specified in docs/bundle.md."""
    model = manifest.model
    kinds = ("key", "value")
    layers = range(model.num_layers)
    ids = ["input_ids", "position_ids"]
    if manifest.cache.layout != "static":
        ids.append("attention_mask")
    elif name == "prefill":
        ids.append("logit_positions")
    past = [f"past_key_values.{i}.{kind}" for i in layers for kind in kinds]
    present = [f"present.{i}.{kind}" for i in layers for kind in kinds]
    for side, tensors, wanted in (
        ("input", graph.inputs, [*ids, *past]),
        ("output", graph.outputs, ["logits", *present]),
    ):
        by_name = {tensor.name: tensor for tensor in tensors}
        for tensor_name in wanted:
            if tensor_name not in by_name:
                yield f"graph {name!r} has no {side} {tensor_name!r}"
                continue
            problem = _tensor_problem(by_name[tensor_name], manifest)
            if problem:
                yield f"{side} {tensor_name!r} of graph {name!r} {problem}"


def _tensor_problem(tensor: TensorSpec, manifest: Manifest) -> str | None:
    model = manifest.model
    dtype: str | None = "int64"
    sizes: dict[int, int] = {}
    rank = 2
    if tensor.name == "logits":
        dtype, rank, sizes = None, 3, {2: model.vocab_size}
    elif tensor.name.startswith(("past_key_values.", "present.")):
        dtype, rank = manifest.cache.dtype, 4
        sizes = {1: model.num_heads, 3: model.head_dim}
        if manifest.cache.layout == "static":
            sizes[2] = manifest.max_length
    if dtype is not None and tensor.dtype != dtype:
        return f"is {tensor.dtype}, expected {dtype}"
    if len(tensor.shape) != rank:
        return f"has shape {list(tensor.shape)}, expected {rank} dimensions"
    for axis, size in sizes.items():
        if isinstance(tensor.shape[axis], int) and tensor.shape[axis] != size:
            return f"has shape {list(tensor.shape)}, expected {size} at dimension {axis}"
    return None
