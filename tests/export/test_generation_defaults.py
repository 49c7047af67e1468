"""What an export says about the generation settings that a checkpoint comes with."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import neo_export
import neo_runtime
import pytest
import torch
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.checkpoint.generation_defaults import (
    SETTINGS,
    check_generation_defaults,
    generation_defaults,
    warn_once,
)
from neo_export.command.cli import main
from neo_runtime.errors import CheckpointError
from neo_runtime.options.generation_options import GenerationOptions
from transformers import GenerationConfig, GPTNeoForCausalLM

DEMO = Path(neo_export.__file__).parent / "demo" / "neo-mini"


def demo_with(folder: Path, **files: Any) -> Path:
    """The demo checkpoint with other JSON files; None for one that goes."""
    shutil.copytree(DEMO, folder)
    for name, content in files.items():
        path = folder / f"{name}.json"
        if content is None:
            path.unlink()
        else:
            path.write_text(json.dumps(content))
    return folder


def notes(folder: Path, max_length: int | None = None) -> list[str]:
    found: list[str] = []
    with open_checkpoint(folder) as checkpoint:
        check_generation_defaults(checkpoint, max_length, found.append)
    return found


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0, expected a number"),
    ({"do_sample": True, "num_beams": 2}, "num_beams is 2 and do_sample is True"),
    ({"encoder_repetition_penalty": 1.2}, "encoder_repetition_penalty is 1.2, which is not"),
    ({"max_time": 3.0}, "max_time is 3.0"),
    ({"my_note": "by me"}, "unknown entry 'my_note' ('by me')"),
    ({"suppress_tokens": [4096]}, "suppress_tokens names token 4096"),
    ({"repetition_penalty": "much"}, "repetition_penalty is 'much'"),
]


@pytest.mark.parametrize(("config", "words"), REFUSED, ids=[next(iter(c)) for c, _ in REFUSED])
def test_what_every_request_would_fail_at_is_refused(
    config: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = demo_with(tmp_path / "checkpoint", generation_config=config)
    assert main([str(folder), "-o", str(tmp_path / "bundle")]) == 2
    printed = capsys.readouterr().err
    assert f"{folder / 'generation_config.json'}: {words}" in printed
    assert "correct or remove the entry in that file, and export again" in printed
    assert "with the request" not in printed
    assert not (tmp_path / "bundle").exists()


def test_stop_strings_need_a_tokenizer(tmp_path: Path) -> None:
    config = {"stop_strings": ["\n"]}
    folder = demo_with(tmp_path / "checkpoint", generation_config=config)
    assert notes(folder) == []
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="the checkpoint has no tokenizer"):
        notes(folder)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"do_sample": False, "temperature": 0.0}, "temperature is 0.0, expected"),
        ({"temperature": 0.7}, "temperature is 0.7, but greedy decoding does not read it"),
        ({"top_k": -1}, "top_k is -1, expected"),
        ({"top_h": 0.4}, "top_h is 0.4"),
        ({"length_penalty": 2.0}, "length_penalty is 2.0, but only beam search reads it"),
        ({"eos_token_id": -1}, "eos_token_id is -1; a negative id is no token"),
        ({"max_new_tokens": 600}, "max_new_tokens is 600; the bundle has 512 positions"),
    ],
)
def test_what_has_no_effect_is_said(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = demo_with(tmp_path / "checkpoint", generation_config=config)
    [note] = notes(folder)
    assert note.startswith(f"{folder / 'generation_config.json'}: {words}")


def test_a_shorter_bundle_is_what_counts(tmp_path: Path) -> None:
    folder = demo_with(tmp_path / "checkpoint", generation_config={"max_new_tokens": 100})
    assert notes(folder) == []
    assert "the bundle has 64 positions" in notes(folder, 64)[0]


def test_there_is_nothing_to_say_about_usual_files(tmp_path: Path) -> None:
    assert notes(DEMO) == []
    config = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "pad_token_id": -1}
    config |= {"max_time": None, "encoder_repetition_penalty": 1.0, "num_beam_groups": 1}
    assert notes(demo_with(tmp_path / "checkpoint", generation_config=config)) == []


def test_an_export_says_it_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    folder = demo_with(tmp_path / "checkpoint", generation_config={"temperature": 0.0})
    with caplog.at_level(logging.WARNING, "neo_export"):
        for name in ("one", "two"):
            assert main([str(folder), "-o", str(tmp_path / name)]) == 0
    [record] = caplog.records
    assert "temperature is 0.0" in record.getMessage()


def edited(**change: Any) -> dict[str, Any]:
    """The demo's `config.json` with more in it."""
    config: dict[str, Any] = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    return config | change


OLD_SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "max_length": 48},
    {"num_beams": 2, "early_stopping": True, "length_penalty": 0.5, "max_new_tokens": 12},
    {"eos_token_id": 524, "suppress_tokens": [14], "max_new_tokens": 30, "top_k": None},
    {"min_length": 20, "bad_words_ids": [[14, 308]], "max_length": 40, "min_new_tokens": None},
]


@pytest.mark.parametrize("change", OLD_SETTINGS, ids=[next(iter(c)) for c in OLD_SETTINGS])
def test_settings_of_an_old_config_are_taken_as_transformers_takes_them(
    change: dict[str, Any], tmp_path: Path
) -> None:
    extra = {"task_specific_params": {"text-generation": {"do_sample": True}}, "my_note": "by me"}
    folder = demo_with(
        tmp_path / "checkpoint", generation_config=None, config=edited(**change, **extra)
    )
    assert main([str(folder), "-o", str(tmp_path / "bundle")]) == 0
    theirs = GPTNeoForCausalLM.from_pretrained(folder, attn_implementation="eager")
    written = GenerationConfig.from_pretrained(tmp_path / "bundle")
    expected, found = theirs.generation_config.to_dict(), written.to_dict()
    no_settings = ("transformers_version", "use_cache", "output_attentions", "output_hidden_states")
    for key in expected.keys() - set(no_settings):
        assert found[key] == expected[key], key
    ids = torch.tensor([[14, 308, 588, 293]])
    with torch.no_grad():
        output = theirs.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0)
    with neo_runtime.load(tmp_path / "bundle", threads=1) as model:
        assert list(model.generate(ids[0].tolist()).token_ids) == output[0, 4:].tolist()


def test_a_generation_config_goes_before_an_old_config(tmp_path: Path) -> None:
    folder = demo_with(tmp_path / "checkpoint", config=edited(repetition_penalty=1.3))
    with open_checkpoint(folder) as checkpoint:
        assert generation_defaults(checkpoint) == checkpoint.generation_config
    theirs = GPTNeoForCausalLM.from_pretrained(folder)
    assert theirs.generation_config.repetition_penalty is None


def test_ids_alone_are_no_settings(tmp_path: Path) -> None:
    folder = demo_with(tmp_path / "checkpoint", generation_config=None)
    with open_checkpoint(folder) as checkpoint:
        assert generation_defaults(checkpoint) is None


def test_a_setting_of_an_old_config_that_cannot_be_honoured(tmp_path: Path) -> None:
    config = edited(diversity_penalty=0.5, num_beams=2)
    folder = demo_with(tmp_path / "checkpoint", generation_config=None, config=config)
    with pytest.raises(CheckpointError, match=r"/config\.json: diversity_penalty is 0\.5"):
        notes(folder)


def test_every_setting_of_transformers_is_known() -> None:
    known = {key for key in GenerationConfig().to_dict() if not key.startswith("_")}
    taken, without_effect = set(), set()
    for key in known - {"bos_token_id", "eos_token_id", "pad_token_id"}:
        (taken if key in SETTINGS else without_effect).add(key)
    assert taken == SETTINGS
    for key in without_effect:  # the runtime has it among what changes no text
        assert GenerationOptions.from_generation_config({key: "x"}) == GenerationOptions()
