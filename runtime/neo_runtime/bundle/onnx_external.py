"""Find the external data of an ONNX model without the `onnx` package.

A model is a protobuf message (`onnx.proto`). This walks its wire format
(https://protobuf.dev/programming-guides/encoding) along the fields that can contain a tensor, and
lists the "location" of each tensor's external data. So a bundle whose graphs read files outside of
it is rejected before a session opens them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ExternalTensor", "external_locations", "external_tensors"]

_SUBMESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}
"""Field numbers in `onnx.proto` that can contain a tensor, by message type."""
_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DEEPEST = 100
"""Most levels of nested messages; protobuf's own parsers have the same limit."""


@dataclass(frozen=True)
class ExternalTensor:
    """An initializer of a graph whose data is in another file."""

    name: str
    element_type: int
    """`TensorProto.DataType`: 1 float32, 2 uint8, 7 int64, 10 float16, 16 bfloat16, …"""
    shape: tuple[int, ...]
    location: str
    """Path of the file, relative to the model's folder."""
    offset: int
    """Offset in the file, in bytes."""
    length: int
    """Size in bytes."""


def external_tensors(model: bytes) -> tuple[ExternalTensor, ...]:
    """The initializers of the main graph that have external data, in the graph's order.

    Args:
        model: contents of a `.onnx` file.

    Raises:
        ValueError: the bytes are not a serialized ONNX model.
    """
    found = []
    for number, graph in _fields(memoryview(model)):
        if number != _MODEL_GRAPH:
            continue
        for kind, tensor in _fields(graph):
            if kind == _GRAPH_INITIALIZER and (read := _tensor(tensor)) is not None:
                found.append(read)
    return tuple(found)


def _tensor(message: memoryview) -> ExternalTensor | None:
    shape: list[int] = []
    element_type, name, places = 0, "", dict[str, str]()
    for number, value in _all_fields(message):
        if number == 1 and isinstance(value, int):
            shape.append(value)
        elif number == 1 and isinstance(value, memoryview):  # packed
            position = 0
            while position < len(value):
                size, position = _varint(value, position)
                shape.append(size)
        elif number == 2 and isinstance(value, int):
            element_type = value
        elif number == 8 and isinstance(value, memoryview):
            name = bytes(value).decode()
        elif number == 13 and isinstance(value, memoryview):
            pair = {n: bytes(text).decode() for n, text in _fields(value)}
            places[pair.get(1, "")] = pair.get(2, "")
    if "location" not in places:
        return None
    return ExternalTensor(
        name=name,
        element_type=element_type,
        shape=tuple(shape),
        location=places["location"],
        offset=int(places.get("offset", 0)),
        length=int(places.get("length", 0)),
    )


def external_locations(model: bytes) -> tuple[str, ...]:
    """The distinct locations of external data of all tensors in a model, sorted.

    Args:
        model: contents of a `.onnx` file.

    Raises:
        ValueError: the bytes are not a serialized ONNX model.
    """
    view = memoryview(model)
    if not any(number == _MODEL_GRAPH for number, _ in _fields(view)):
        raise ValueError("it contains no graph")
    found = {
        location for entry in _entries(view, "ModelProto", 0) if (location := _location(entry))
    }
    return tuple(sorted(found))


def _entries(message: memoryview, kind: str, depth: int) -> Iterator[memoryview]:
    """The `external_data` entries (StringStringEntryProto) of all tensors in a message."""
    if depth > _DEEPEST:
        raise ValueError(f"messages are nested deeper than {_DEEPEST}")
    children = _SUBMESSAGES[kind]
    for number, value in _fields(message):
        child = children.get(number)
        if child is None:
            continue
        if child == "StringStringEntryProto":
            yield value
        else:
            yield from _entries(value, child, depth + 1)


def _location(entry: memoryview) -> str | None:
    """The value of an entry with key "location", else None; of repeated fields the last counts."""
    pair = {1: b"", 2: b""}
    for number, value in _fields(entry):
        if number in pair:
            pair[number] = bytes(value)
    # Escaped, a location that is not UTF-8 can be shown, and matches no file name.
    return pair[2].decode("utf-8", "backslashreplace") if pair[1] == b"location" else None


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and contents of each length-delimited field; other wire types are skipped."""
    return ((n, value) for n, value in _all_fields(message) if isinstance(value, memoryview))


def _all_fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Number and value of each length-delimited or varint field; fixed-size ones are skipped."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise ValueError(f"invalid field number {number} at byte {position}")
        if wire == _VARINT:
            integer, position = _varint(message, position)
            yield number, integer
        elif wire in (_FIXED64, _FIXED32):
            position += 8 if wire == _FIXED64 else 4
        elif wire == _BYTES:
            size, position = _varint(message, position)
            if position + size <= end:
                yield number, message[position : position + size]
            position += size
        else:
            raise ValueError(f"unknown wire type {wire} at byte {position}")
    if position > end:
        raise ValueError("the file ends inside a field")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Decode a varint: its value, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ValueError("the file ends inside a number")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number of more than 64 bits at byte {position}")
