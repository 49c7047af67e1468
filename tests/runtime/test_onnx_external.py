"""The protobuf walk finds what `onnx` itself finds, everywhere that a tensor can hide."""

from __future__ import annotations

import onnx
import pytest
from helpers.bundles import external_tensor, graph_bytes
from hypothesis import given
from hypothesis import strategies as st
from neo_runtime.bundle.onnx_external import external_locations
from onnx import TensorProto, helper
from onnx.external_data_helper import _get_all_tensors


def locations_by_onnx(data: bytes) -> tuple[str, ...]:
    tensors = _get_all_tensors(onnx.load_from_string(data))
    entries = (entry for tensor in tensors for entry in tensor.external_data)
    return tuple(sorted({entry.value for entry in entries if entry.key == "location"}))


def test_initializers() -> None:
    inline = helper.make_tensor("inline", TensorProto.FLOAT, [2], [1.0, 2.0])
    data = graph_bytes(
        "decode", external_tensor("a", "weights.bin"), inline, external_tensor("b", "élan/ß.bin")
    )
    assert external_locations(data) == ("weights.bin", "élan/ß.bin") == locations_by_onnx(data)


def test_a_graph_without_external_data() -> None:
    assert external_locations(graph_bytes("decode")) == ()


def test_attributes_of_nodes_and_their_subgraphs() -> None:
    constant = helper.make_node("Constant", [], ["c"], value=external_tensor("v", "attribute.bin"))
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["d"], value=external_tensor("d", "deep.bin"))],
        "branch",
        [],
        [],
        [external_tensor("i", "branch.bin")],
    )
    branch = helper.make_node("If", ["c"], ["e"], then_branch=inner, else_branch=inner)
    several = helper.make_node("Custom", [], ["f"], domain="x")
    several.attribute.append(
        helper.make_attribute(
            "many", [external_tensor("0", "0.bin"), external_tensor("1", "1.bin")]
        )
    )
    data = graph_bytes("score", external_tensor("w", "w.bin"), nodes=(constant, branch, several))
    expected = ("0.bin", "1.bin", "attribute.bin", "branch.bin", "deep.bin", "w.bin")
    assert external_locations(data) == expected
    assert locations_by_onnx(data) == expected


def test_sparse_tensors_functions_and_training() -> None:
    model = onnx.load_from_string(graph_bytes("score"))
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(external_tensor("s", "values.bin"))
    sparse.indices.CopyFrom(external_tensor("i", "indices.bin"))
    attribute = model.graph.node.add(op_type="Constant", output=["k"]).attribute.add()
    attribute.sparse_tensor.values.CopyFrom(external_tensor("k", "attribute.bin"))
    attribute.sparse_tensors.add().values.CopyFrom(external_tensor("l", "attributes.bin"))
    function = model.functions.add(name="f", domain="x")
    function.node.add(op_type="Constant").attribute.add().t.CopyFrom(external_tensor("f", "f.bin"))
    function.attribute_proto.add().t.CopyFrom(external_tensor("p", "default.bin"))
    training = model.training_info.add()
    training.initialization.initializer.append(external_tensor("t", "init.bin"))
    training.algorithm.initializer.append(external_tensor("u", "step.bin"))
    expected = ["attribute.bin", "attributes.bin", "default.bin", "f.bin", "indices.bin"]
    expected += ["init.bin", "step.bin", "values.bin"]
    assert external_locations(model.SerializeToString()) == tuple(expected)


def test_a_message_in_two_pieces_is_merged_as_protobuf_does() -> None:
    """A second `graph` field, and a key given twice: the last one counts."""
    first, second = graph_bytes("decode"), graph_bytes("decode", external_tensor("w", "late.bin"))
    assert locations_by_onnx(first + second) == ("late.bin",)
    assert external_locations(first + second) == ("late.bin",)

    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1])
    key = b"\x0a\x08location"
    entry = b"\x0a\x03abc" + b"\x12\x01x" + key + b"\x12\x06up.bin"
    raw = tensor.SerializeToString() + b"\x6a" + bytes([len(entry)]) + entry
    parsed = TensorProto.FromString(raw)
    assert parsed.external_data[0].value == "up.bin"
    assert external_locations(graph_bytes("decode", parsed)) == ("up.bin",)
    # Not re-serialized by protobuf: graph { initializer { raw } } by hand.
    graph = b"\x2a" + bytes([len(raw)]) + raw
    assert external_locations(b"\x3a" + bytes([len(graph)]) + graph) == ("up.bin",)


def test_fields_of_unknown_numbers_are_stepped_over() -> None:
    extra = (
        b"\xf8\x07\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"  # field 127, a varint of ten bytes
        b"\xf9\x07" + bytes(8) + b"\xfd\x07" + bytes(4) + b"\xfa\x07\x03abc"
    )
    data = graph_bytes("decode", external_tensor("w", "weights.bin"))
    assert locations_by_onnx(extra + data) == ("weights.bin",)
    assert external_locations(extra + data) == ("weights.bin",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it contains no graph"),
        (b"\x08\x0a", "it contains no graph"),
        (b"\x3a\x05ab", "the file ends inside a field"),
        (b"\x3a", "the file ends inside a number"),
        (b"\x3a\xff", "the file ends inside a number"),
        (b"\x80" * 11, "a number of more than 64 bits"),
        (b"\x3b", "wire type 3"),
        (b"\x02\x00", "field number 0"),
        (b"\x39\x00", "the file ends inside a field"),
        (b"\x3a\x02\x2a\x05", "the file ends inside a field"),
    ],
)
def test_what_is_no_model(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        external_locations(data)


def test_nesting_without_end_is_refused() -> None:
    data = b""
    for _ in range(200):  # graph.node.attribute.g
        for tag in (0x32, 0x2A, 0x0A):
            size = len(data)
            length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
            data = bytes([tag]) + length + data
    length = bytes([len(data) & 127 | 128, len(data) >> 7])
    with pytest.raises(ValueError, match="nested deeper than 100"):
        external_locations(b"\x3a" + length + data)


@given(st.binary(max_size=200))
def test_any_bytes_give_an_answer_or_a_value_error(data: bytes) -> None:
    try:
        found = external_locations(b"\x3a\x00" + data)
    except ValueError:
        return
    assert found == () or b"location" in data
