"""What an export says about the generation settings that a checkpoint comes with."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import neo_export
import pytest
from neo_export.checkpoint import open_checkpoint
from neo_export.cli import main
from neo_export.generation_defaults import check_generation_defaults, warn_once
from neo_runtime.errors import CheckpointError

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
