"""Which files an ONNX graph reads its tensors from, found without the `onnx` package.

A graph file is a protobuf message (`onnx.proto`). This walks its wire format
(https://protobuf.dev/programming-guides/encoding) along the fields that lead to a tensor, and
lists the "location" of every tensor's external data, so that a bundle whose graphs would read
files outside of it is refused before a session opens it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["external_locations"]

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
"""Field numbers of `onnx.proto` behind which a tensor may be."""
_MODEL_GRAPH = 7
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DEEPEST = 100
"""protobuf itself refuses deeper nesting."""


def external_locations(model: bytes) -> tuple[str, ...]:
    """Every distinct "location" of external data in a serialized ONNX model, sorted.

    Args:
        model: the contents of a `.onnx` file.

    Raises:
        ValueError: not a serialized ONNX model.
    """
    view = memoryview(model)
    if not any(number == _MODEL_GRAPH for number, _ in _fields(view)):
        raise ValueError("no graph in it")
    found = {
        location for entry in _entries(view, "ModelProto", 0) if (location := _location(entry))
    }
    return tuple(sorted(found))


def _entries(message: memoryview, kind: str, depth: int) -> Iterator[memoryview]:
    """The StringStringEntryProtos of all tensors' external_data in `message`."""
    if depth > _DEEPEST:
        raise ValueError(f"messages nested deeper than {_DEEPEST}")
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
    """The value of a (key, value) pair whose key is "location"; a field's last value counts."""
    pair = {1: b"", 2: b""}
    for number, value in _fields(entry):
        if number in pair:
            pair[number] = bytes(value)
    # A location that is no UTF-8 stays visible, and equals no name of a file.
    return pair[2].decode("utf-8", "backslashreplace") if pair[1] == b"location" else None


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and contents of each length-delimited field; the other kinds are stepped over."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise ValueError(f"field number {number} at byte {position}")
        if wire == _VARINT:
            _, position = _varint(message, position)
        elif wire in (_FIXED64, _FIXED32):
            position += 8 if wire == _FIXED64 else 4
        elif wire == _BYTES:
            size, position = _varint(message, position)
            if position + size <= end:
                yield number, message[position : position + size]
            position += size
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
    if position > end:
        raise ValueError("the file ends inside a field")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """A number and the position behind it."""
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
