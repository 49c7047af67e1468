"""NVIDIA's parser and builder (TensorRT for RTX, if installed), which need no GPU."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from helpers.graphs import passes_of
from neo_export.bundle.weights import bind_parameters
from neo_export.engine.flavour import find_flavour
from neo_export.gpt_neo.graphs import build_graph
from neo_export.targets import TARGETS
from onnx_ir.passes.common import RemoveUnusedNodesPass

if TYPE_CHECKING:
    from pathlib import Path

    from neo_export.engine.flavour import Flavour
    from neo_export.passes.quantize_linear import ActivationRange
    from neo_runtime.bundle.manifest import ModelSpec

needs_tensorrt_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: its wheels are for Linux and Windows on x86-64",
)


def flavour() -> Flavour:
    return find_flavour("tensorrt_rtx")


def write_hollow_graphs(
    spec: ModelSpec,
    precision: str,
    folder: Path,
    largest_input: ActivationRange | None = None,
) -> dict[str, Path]:
    """The target's graphs over sparse files of zeros: any model size without real weights."""
    paths = {}
    for name, entry in TARGETS["tensorrt"].graphs:
        model = build_graph(entry, spec)
        bind_parameters(model, _no_data)
        for rewrite in passes_of("tensorrt", precision, name, spec, largest_input=largest_input):
            rewrite(model)
            RemoveUnusedNodesPass()(model)
        _refer_to_zeros(model, folder)
        paths[name] = folder / f"{name}.onnx"
        ir.save(model, paths[name])
    return paths


def _no_data(name: str) -> Any:
    raise AssertionError(f"{name} was read")


def _refer_to_zeros(model: ir.Model, folder: Path) -> None:
    offset, scales = 0, []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.LazyTensor):
            continue
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(
            f"{model.graph.name}.bin",
            offset,
            tensor.nbytes,
            value.dtype,
            shape=value.shape,
            name=name,
            base_dir=folder,
        )
        if name.endswith(".scales"):  # TensorRT accepts only positive scales
            scales.append((offset, tensor.size))
        offset += -(-tensor.nbytes // 4096) * 4096
    with (folder / f"{model.graph.name}.bin").open("wb") as file:
        file.truncate(offset)
        for start, size in scales:
            file.seek(start)
            file.write(np.full(size, 0.01, dtype=np.float16).tobytes())
