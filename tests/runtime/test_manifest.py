"""`neo.json`: exact inverse functions, and an error of its own for everything it cannot be."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest
from helpers.bundles import edit_json, make_bundle, rewrite_manifest
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.bundle.manifest import FileRecord, Manifest
from neo_runtime.errors import BundleDamagedError, BundleUnsupportedError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_writing_and_reading_are_inverse(folder: Path) -> None:
    manifest = rewrite_manifest(folder)
    text = manifest.to_json()
    assert Manifest.from_json(text) == manifest
    assert Manifest.from_json(text).to_json() == text
    assert text.endswith("}\n")


def test_the_text_does_not_depend_on_the_order_of_dictionaries(folder: Path) -> None:
    manifest = rewrite_manifest(folder)
    turned = dataclasses.replace(
        manifest,
        files=dict(reversed(manifest.files.items())),
        graphs=dict(reversed(manifest.graphs.items())),
    )
    assert list(turned.files) != list(manifest.files)
    assert turned.to_json() == manifest.to_json()
    assert turned.digest == manifest.digest


def test_the_digest_names_files_and_contents(folder: Path) -> None:
    manifest = rewrite_manifest(folder)
    record = manifest.files["config.json"]
    altered = manifest.files | {"config.json": FileRecord(size=record.size, sha256="0" * 64)}
    renamed = {("other" if n == "config.json" else n): r for n, r in manifest.files.items()}
    digests = {
        manifest.digest,
        dataclasses.replace(manifest, files=altered).digest,
        dataclasses.replace(manifest, files=renamed).digest,
    }
    assert len(digests) == 3
    assert dataclasses.replace(manifest, tools={}).digest == manifest.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is not valid JSON \(Expecting value"),
        ("{", "is not valid JSON"),
        ("\0" * 40, "is not valid JSON"),
        ("[1]", "contains list, expected a JSON object"),
        ("{}", "schema_version is None, expected a number"),
        ('{"schema_version": "1"}', "schema_version is '1', expected a number"),
        ('{"schema_version": 1}', "field '.*' is missing"),
    ],
)
def test_texts_that_are_no_manifest(folder: Path, text: str, message: str) -> None:
    (folder / "neo.json").write_text(text)
    with pytest.raises(BundleDamagedError, match=rf"neo\.json.*{message}"):
        open_bundle(folder)


def test_bytes_that_are_no_text(folder: Path) -> None:
    (folder / "neo.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(BundleDamagedError, match=r"neo\.json is not UTF-8 text \(.* at byte 2\)"):
        open_bundle(folder)


def test_a_newer_schema_is_told_before_its_unknown_fields(folder: Path) -> None:
    edit_json(folder, "schema_version", value=7)
    edit_json(folder, "hologram", value={})
    with pytest.raises(BundleUnsupportedError, match=r"schema version 7, .* upgrade neo-onnx"):
        open_bundle(folder)


WRONG_TYPES: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("max_length",), "16", "max_length: found '16', expected int"),
    (("max_length",), True, "max_length: found True, expected int"),
    (("max_length",), 16.0, "max_length: found 16.0, expected int"),
    (("max_length",), None, "max_length: found None, expected int"),
    (("has_tokenizer",), 1, "has_tokenizer: found 1, expected bool"),
    (("precision",), 32, "precision: found 32, expected str"),
    (("model",), [], "model: found .*, expected an object"),
    (("model", "attention_layers"), "global", "attention_layers: found 'global', expected"),
    (("model", "attention_layers", 1), 3, r"attention_layers\[1\]: found 3, expected str"),
    (("model", "eos_token_id"), 0, "eos_token_id: found 0, expected"),
    (("model", "bos_token_id"), "0", "bos_token_id: found '0', expected int"),
    (("model", "layer_norm_epsilon"), "1e-5", "layer_norm_epsilon: found '1e-5', expected float"),
    (("cache", "layout"), "sideways", "layout: found 'sideways', expected"),
    (("cache", "padding"), 1, "padding: found 1, expected"),
    (("graphs",), [], "graphs: found .*, expected"),
    (("graphs", "decode"), "decode.onnx", "graphs.decode: found .*, expected an object"),
    (("graphs", "decode", "inputs", 0, "shape", 0), 1.5, r"shape\[0\]: found 1.5, expected"),
    (("probes", 0, "channels"), [1], "channels: found .*, expected"),
    (("probes", 0, "channels", 1), "2", "channels: found .*, expected"),
    (("files", "config.json", "size"), "26", "size: found '26', expected int"),
    (("tools", "onnx"), 1.23, "tools.onnx: found 1.23, expected str"),
]


@pytest.mark.parametrize(("keys", "value", "message"), WRONG_TYPES)
def test_wrong_types(folder: Path, keys: tuple[str | int, ...], value: Any, message: str) -> None:
    edit_json(folder, *keys, value=value)
    remedy = "; export the bundle again$"
    with pytest.raises(BundleDamagedError, match=rf"neo\.json.*{message}.*{remedy}"):
        open_bundle(folder)


@pytest.mark.parametrize(
    "keys",
    [
        ("files",),
        ("model", "window_size"),
        ("cache", "layout"),
        ("graphs", "score", "file"),
        ("graphs", "prefill", "inputs", 0, "dtype"),
        ("files", "weights.bin", "sha256"),
        ("probes", 0, "value"),
    ],
)
def test_missing_and_unknown_fields(folder: Path, keys: tuple[str | int, ...]) -> None:
    edit_json(folder, *keys[:-1], "surplus", value=1)
    with pytest.raises(BundleDamagedError, match="unknown field 'surplus'"):
        open_bundle(folder)
    edit_json(folder, *keys[:-1], "surplus", delete=True)
    open_bundle(folder)
    edit_json(folder, *keys, delete=True)
    with pytest.raises(BundleDamagedError, match=rf"field '{keys[-1]}' is missing"):
        open_bundle(folder)


def test_every_truncation_is_told(folder: Path) -> None:
    data = (folder / "neo.json").read_bytes()
    for length in range(0, len(data) - 1, 29):
        (folder / "neo.json").write_bytes(data[:length])
        with pytest.raises(BundleDamagedError):
            open_bundle(folder, check_runtime=False)


def test_a_flipped_bit_is_told_unless_the_values_stay_the_same(folder: Path) -> None:
    data = (folder / "neo.json").read_bytes()
    told = 0
    for position in range(0, len(data), 23):
        altered = bytearray(data)
        altered[position] ^= 1 << (position % 8)
        (folder / "neo.json").write_bytes(altered)
        try:
            bundle = open_bundle(folder, check_runtime=False)
        except BundleDamagedError:
            told += 1
        except BundleUnsupportedError as error:
            told += "schema version" in str(error)
        else:  # A space that became a tab, say.
            assert json.loads(altered) == json.loads(data)
            assert bundle.manifest.to_json().encode() == data
    assert told > len(data) / 23 * 0.6


def test_a_changed_value_is_told(folder: Path) -> None:
    text = (folder / "neo.json").read_text()
    assert text.count('"window_size": 4') == 1
    (folder / "neo.json").write_text(text.replace('"window_size": 4', '"window_size": 5'))
    with pytest.raises(BundleDamagedError, match=r"neo\.json was altered after it was written"):
        open_bundle(folder)
