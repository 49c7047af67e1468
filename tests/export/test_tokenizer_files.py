from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import neo_export
import neo_runtime
import pytest
from neo_export import exporter
from neo_export.checkpoint.tokenizer_files import find_tokenizer_files, read_tokenizer_json
from neo_export.command.cli import main
from neo_export.exporter import export_bundle
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.errors import CheckpointError, RequestError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2Tokenizer

DEMO = Path(neo_export.__file__).parent / "demo" / "neo-mini"
TEXTS = [
    "Once upon a time, there was a little fox.",
    " two  spaces\tand\n\nlines ",
    "naïve café — “quotes”, 日本語, 🦊👩‍👩‍👧",
    "a<|endoftext|>b <|endoftext|> c<pad>d <extra>  <new> word<new>s",
    "don't we'll I'M x²=4 1234567890",
    "",
]


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A folder with `vocab.json` and `merges.txt` only, those of the demo model."""
    model = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    text = "#version: 0.2\n" + "\n".join(merges) + "\n"
    (tmp_path / "merges.txt").write_text(text, encoding="utf-8")
    return tmp_path


def built(folder: Path) -> Tokenizer:
    data = read_tokenizer_json(folder)
    assert data is not None
    return Tokenizer.from_str(data.decode("utf-8"))


def assert_equals_transformers(folder: Path) -> None:
    ours, theirs = built(folder), GPT2Tokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids, text
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected
    assert ours.get_vocab() == theirs.get_vocab()


NEW = 4096  # the first id behind the demo's vocabulary


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config.json": {"add_prefix_space": True}},
        {"tokenizer_config.json": {"add_bos_token": True}},
        {
            "special_tokens_map.json": {
                "eos_token": "<|endoftext|>",
                "pad_token": {"content": "<pad>", "lstrip": True, "rstrip": False},
            },
            "tokenizer_config.json": {"additional_special_tokens": ["<extra>"]},
            "added_tokens.json": {"<pad>": NEW, "<extra>": NEW + 1, "<new>": NEW + 2},
        },
        {
            "tokenizer_config.json": {
                "pad_token": "<pad>",
                "added_tokens_decoder": {
                    "0": {"content": "<|endoftext|>", "special": True},
                    str(NEW + 1): {"content": "<new>", "lstrip": True},
                    str(NEW): {"content": "<pad>", "special": True, "rstrip": True},
                },
            }
        },
    ],
    ids=["plain", "prefix-space", "bos", "added", "decoder"],
)
def test_built_from_the_pair_it_encodes_as_transformers(
    pair: Path, files: dict[str, dict[str, Any]]
) -> None:
    for name, content in files.items():
        (pair / name).write_text(json.dumps(content))
    assert_equals_transformers(pair)


def test_the_pair_is_the_demo_tokenizer(pair: Path) -> None:
    demo = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    for text in TEXTS:
        assert built(pair).encode(text).ids == demo.encode(text).ids


def test_the_same_files_give_the_same_bytes(pair: Path) -> None:
    assert read_tokenizer_json(pair) == read_tokenizer_json(pair)
    assert [path.name for path in find_tokenizer_files(pair)] == ["vocab.json", "merges.txt"]


def test_a_whole_file_comes_first(pair: Path) -> None:
    data = (DEMO / "tokenizer.json").read_bytes()
    (pair / "tokenizer.json").write_bytes(data)
    (pair / "vocab.json").write_text("not read")
    assert read_tokenizer_json(pair) == data


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<new>": NEW, "<extra>": NEW + 1}),
        (
            "tokenizer_config.json",
            {
                "added_tokens_decoder": {
                    "0": {"content": "<|endoftext|>", "special": True},
                    str(NEW): {"content": "<new>", "normalized": False, "special": False},
                    str(NEW + 1): {"content": "<extra>", "normalized": False, "special": True},
                }
            },
        ),
    ],
)
def test_tokens_beside_a_whole_file_are_added(
    name: str, content: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = (DEMO / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(data)
    (tmp_path / "config.json").write_bytes((DEMO / "config.json").read_bytes())
    assert read_tokenizer_json(tmp_path) == data
    (tmp_path / name).write_text(json.dumps(content))
    ours = built(tmp_path)
    assert ours.token_to_id("<new>") == NEW
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": NEW + 7}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with caplog.at_level(logging.WARNING, "neo_export"):
        assert read_tokenizer_json(tmp_path) == data
    assert "should have id 4103 and would get 4096" in caplog.text
    assert "Only what tokenizer.json holds is used" in caplog.text


END = {"content": "<|endoftext|>", "special": True, "normalized": False}
LOOSE = {"content": "<pad>", "lstrip": True, "rstrip": True, "normalized": False}
BESIDE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "space": {"config": {"add_prefix_space": True}},
    "no-space": {"config": {"add_prefix_space": False}},
    "pad": {"config": {"pad_token": "<pad>"}},
    "all-named": {
        "config": {f"{name}_token": f"<{name}>" for name in ("mask", "pad", "cls", "sep", "bos")}
    },
    "older": {"older": {"pad_token": LOOSE, "eos_token": "<new>"}},
    "older-not-read": {
        "config": {"added_tokens_decoder": {"0": END}},
        "older": {"pad_token": "<pad>"},
    },
    "extra": {"config": {"extra_special_tokens": ["<new>", "<extra>"]}},
    "named-extra": {"config": {"extra_special_tokens": {"image_token": "<extra>"}}},
}


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("kind", [None, "GPT2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("files", BESIDE.values(), ids=BESIDE)
def test_a_whole_file_and_those_beside_it_encode_as_in_transformers(
    files: dict[str, dict[str, Any]],
    kind: str | None,
    listed: bool,
    spaced: bool,
    tmp_path: Path,
) -> None:
    whole = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    whole["pre_tokenizer"]["add_prefix_space"] = spaced
    if not listed:
        whole["added_tokens"] = []
    config = files.get("config", {}) | ({} if kind is None else {"tokenizer_class": kind})
    for name, content in (
        ("tokenizer.json", whole),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", files.get("older", {})),
        ("config.json", json.loads((DEMO / "config.json").read_text(encoding="utf-8"))),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    ours, theirs = built(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "The dog", " The dog", "a <pad> b<mask><bos> <|endoftext|>"):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.get_vocab() == theirs.get_vocab()


def test_a_file_that_splits_in_its_own_way_keeps_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    whole["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [whole["pre_tokenizer"]]}
    data = json.dumps(whole).encode()
    (tmp_path / "tokenizer.json").write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    assert read_tokenizer_json(tmp_path) == data
    assert "add_prefix_space, and the file splits text in a way of its own" in caplog.text


def test_tokens_that_the_model_lacks_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<pad>"}))
    assert main([str(folder), "-o", str(tmp_path / "bundle")]) == 0
    assert "the model of 4096 tokens has no row for: '<pad>' (4096);" in caplog.text
    with neo_runtime.load(tmp_path / "bundle", threads=1) as model:
        assert model.generate("Tom", max_new_tokens=2).token_ids
        with pytest.raises(RequestError, match="token id 4096 at index 1 is out of range"):
            model.generate("Tom<pad>")
    caplog.clear()
    assert main([str(DEMO), "-o", str(tmp_path / "demo")]) == 0
    assert caplog.text == ""


def test_no_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer_json(tmp_path) is None
    assert find_tokenizer_files(tmp_path) == ()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer.json": "{}"}, "tokenizer.json cannot be used as a tokenizer"),
        ({"tokenizer.json": "\ud800"}, "tokenizer.json cannot be used as a tokenizer"),
        ({"vocab.json": None}, "has merges.txt and no vocab.json; expected both"),
        ({"merges.txt": None}, "has vocab.json and no merges.txt; expected both"),
        ({"vocab.json": "["}, "vocab.json is not valid JSON"),
        ({"vocab.json": "[]"}, "vocab.json holds a JSON list"),
        ({"vocab.json": '{"a": "b"}'}, "vocab.json and merges.txt cannot be used"),
        ({"vocab.json": '{"a": 0}'}, "vocab.json and merges.txt cannot be used"),
        ({"merges.txt": "#version: 0.2\none two three\n"}, "merges.txt cannot be used"),
        ({"added_tokens.json": '{"<new>": 9999}'}, "'<new>' should have id 9999 and would get"),
        ({"added_tokens.json": '{"<new>": null}'}, "the added tokens are damaged"),
        ({"tokenizer_config.json": '{"added_tokens_decoder": {"1": 2}}'}, "tokens are damaged"),
        (
            {"tokenizer_config.json": '{"pad_token": {"content": "a", "lstrip": "yes"}}'},
            "token 'a' is damaged",
        ),
        ({"special_tokens_map.json": "3"}, "special_tokens_map.json holds a JSON int"),
    ],
)
def test_damaged_files(pair: Path, files: dict[str, str | None], words: str) -> None:
    for name, content in files.items():
        if content is None:
            (pair / name).unlink()
        else:
            (pair / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=words):
        read_tokenizer_json(pair)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_a_damaged_tokenizer_is_told_before_the_weights_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*_: object) -> None:
        raise AssertionError("the export goes on")

    monkeypatch.setattr(exporter, "prepare", prepare)
    folder = shutil.copytree(DEMO, tmp_path / "model")
    (folder / name).write_text('{"half')
    with pytest.raises(CheckpointError, match=name):
        export_bundle(str(folder), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def _without_tokenizer(folder: Path) -> Path:
    names = [path.name for path in find_tokenizer_files(DEMO)]
    return Path(shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns(*names)))


def test_the_tokenizer_of_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = _without_tokenizer(tmp_path / "bare")
    export_bundle(str(DEMO), tmp_path / "whole")
    assert main([str(bare), "-o", str(tmp_path / "named"), "--tokenizer", str(DEMO)]) == 0
    digests = [
        open_bundle(tmp_path / name, verify=True).manifest.digest for name in ("whole", "named")
    ]
    assert digests[0] == digests[1]


def test_a_folder_without_a_tokenizer_is_not_taken_for_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = _without_tokenizer(tmp_path / "bare")
    output = tmp_path / "bundle"
    assert main([str(DEMO), "-o", str(output), "--tokenizer", str(bare)]) == 2
    assert f"--tokenizer: {bare} has no tokenizer; expected" in capsys.readouterr().err
    assert main([str(DEMO), "-o", str(output), "--tokenizer", str(tmp_path / "nowhere")]) == 2
    assert "nowhere' does not exist" in capsys.readouterr().err
    assert not output.exists()
