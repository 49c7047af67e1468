"""The weight file that all graphs of a bundle share: `weights.bin`, as ONNX external data.

Every tensor is computed (memory-mapped, transposed, rounded, …) when it is written, so private
memory holds one at a time. Tensors of at least a page are aligned to pages, smaller ones to 64
bytes.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from neo_runtime.bundle.manifest import WEIGHTS_NAME, FileRecord

from neo_export.passes._tensors import ALIAS_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from neo_export.gpt_neo.parameters import ReadParameter

__all__ = [
    "bind_parameters",
    "sort_initializers",
    "write_weights",
]

PAGE = 4096
SMALL = 64
_CHUNK = 1 << 24


def bind_parameters(model: ir.Model, read: ReadParameter) -> None:
    """Bind each initializer without data to the checkpoint; it is read when it is written."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = _from_checkpoint(name, value, read)


def _from_checkpoint(name: str, value: ir.Value, read: ReadParameter) -> ir.LazyTensor:
    assert value.shape is not None
    return ir.LazyTensor(
        lambda: ir.tensor(read(name), name=name),
        dtype=ir.DataType.FLOAT,
        shape=value.shape,
        name=name,
        cache=False,
    )


def sort_initializers(graph: ir.Graph) -> None:
    """Order the initializers the same way in all graphs of a bundle: weights, then constants.

    onnxruntime writes prepacked weights in this order. So its files for prefill, decode and score
    are byte-identical, and one of them serves all. Constants differ between graphs. They come last,
    because onnxruntime fills the slot of an initializer that was folded away from the end.
    """
    values = sorted(
        graph.initializers.items(),
        key=lambda item: (not isinstance(item[1].const_value, ir.LazyTensor), item[0]),
    )
    for name, _ in values:
        del graph.initializers[name]
    for _, value in values:
        graph.register_initializer(value)


def write_weights(
    models: Mapping[str, ir.Model],
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> FileRecord:
    """Write each distinct lazy initializer once, and make all models refer to it.

    Initializers of the same name are the same tensor. A graph's small constants (shapes, scalars)
    stay inside the graph.

    Args:
        models: by graph name; their lazy initializers become references into the file.
        folder: where `weights.bin` is created.
        progress: called with the bytes written and the total.

    Returns:
        Size and checksum of the file.
    """
    tensors: dict[str, ir.Value] = {}
    for model in models.values():
        for name, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.LazyTensor) and not _alias(value):
                tensors.setdefault(name, value)
    total = sum(_nbytes(value) for value in tensors.values())
    path = folder / WEIGHTS_NAME
    digest, offset, places = hashlib.sha256(), 0, {}
    with path.open("wb") as file:
        for name, value in tensors.items():
            size = _nbytes(value)
            padding = -offset % (PAGE if size >= PAGE else SMALL)
            file.write(bytes(padding))
            digest.update(bytes(padding))
            offset += padding
            places[name] = (offset, size)
            for chunk in _chunks(value):
                file.write(chunk)
                digest.update(chunk)
                offset += len(chunk)
                if progress is not None:
                    progress(offset, total)
    for model in models.values():
        _refer(model, places, folder)
    return FileRecord(size=offset, sha256=digest.hexdigest())


def _alias(value: ir.Value) -> str | None:
    """The initializer whose bytes this one shares, if any."""
    return value.metadata_props.get(ALIAS_KEY)


def _nbytes(value: ir.Value) -> int:
    tensor = value.const_value
    assert tensor is not None
    return tensor.nbytes


def _chunks(value: ir.Value) -> list[memoryview]:
    """The tensor's bytes, little-endian, in chunks; they keep the array alive."""
    assert value.const_value is not None
    assert value.dtype is not None
    if value.dtype.bitwidth < 8:  # numpy has one element per byte, ONNX packs them
        flat = memoryview(value.const_value.tobytes())
    else:
        array = np.ascontiguousarray(value.const_value.numpy())
        flat = array.reshape(-1).view(np.uint8).data
    if len(flat) != _nbytes(value):
        raise AssertionError(f"{value.name}: {len(flat)} bytes made, {_nbytes(value)} announced")
    return [flat[start : start + _CHUNK] for start in range(0, len(flat), _CHUNK)]


def _refer(model: ir.Model, places: Mapping[str, tuple[int, int]], folder: Path) -> None:
    for name, value in model.graph.initializers.items():
        stored_as = _alias(value) or name
        if stored_as in places and isinstance(value.const_value, ir.LazyTensor):
            offset, size = places[stored_as]
            assert value.dtype is not None
            assert value.shape is not None
            value.const_value = ir.ExternalTensor(
                WEIGHTS_NAME,
                offset,
                size,
                value.dtype,
                shape=value.shape,
                name=name,
                base_dir=folder,
            )
