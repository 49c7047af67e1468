"""Bundles whose `generation_config.json` has entries that a request cannot, or need not, honour."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import neo_runtime
import pytest
import torch
from helpers.derived_bundles import bundle_with, derived_bundle, without_tokenizer
from helpers.hf_reference import demo_reference, varied_prompts
from neo_runtime.command.generate import main
from neo_runtime.errors import BundleDamagedError, GenerationConfigError, RequestError
from neo_runtime.options.generation_options import GenerationOptions
from transformers import GenerationConfig

if TYPE_CHECKING:
    from pathlib import Path

    from neo_runtime.model import Model


def model_with(config: dict[str, Any], source: Path, folder: Path) -> Model:
    return neo_runtime.load(bundle_with(config, source, folder), threads=1)


GREEDY_FILES: list[dict[str, Any]] = [
    {"do_sample": False, "temperature": 0.0},
    {"temperature": -1.0, "top_k": -1, "top_p": 1.5, "min_p": -0.5, "typical_p": 0.0},
    {"epsilon_cutoff": 2.0, "eta_cutoff": -1.0, "top_h": 0.4},
    {"eos_token_id": -1},
    {"eos_token_id": [-1, 524]},
    {"length_penalty": 99.0, "early_stopping": True},
    {"temperature": 0.0, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("config", GREEDY_FILES, ids=[",".join(c) for c in GREEDY_FILES])
def test_a_file_that_transformers_generates_with_gives_its_text(
    config: dict[str, Any], mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = demo_reference().model
    monkeypatch.setattr(theirs, "generation_config", GenerationConfig.from_dict(config))
    prompt = varied_prompts()[0]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40)
    with model_with(config, mini_bundle, tmp_path / "bundle") as model:
        found = model.generate(prompt, max_new_tokens=40).token_ids
    assert list(found) == output[0, len(prompt) :].tolist()


def test_what_is_left_out_is_said_once(
    mini_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"temperature": 0.0, "top_h": 0.5, "eos_token_id": -1, "max_new_tokens": 5000}
    with (
        model_with(config, mini_bundle, tmp_path / "bundle") as model,
        caplog.at_level(logging.WARNING, "neo_runtime"),
    ):
        options = model.options(num_return_sequences=1)
        assert model.options(num_return_sequences=1) == options
    assert (options.temperature, options.eos_token_id) == (1.0, ())
    assert (options.max_new_tokens, options.max_length) == (None, model.manifest.max_length)
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 4
    assert all(message.startswith(str(tmp_path / "bundle")) for message in messages), "whose"
    for words in (
        "generation_config.json: temperature is 0.0, expected a number that float32 holds, above 0",
        "greedy decoding does not read it",
        "generation_config.json: top_h is 0.5",
        "generation_config.json: eos_token_id is -1",
        "generation_config.json: max_new_tokens is 5000; the bundle has 512 positions",
    ):
        assert any(words in message for message in messages), words


def test_each_bundle_says_it(
    mini_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("one", "other"):
        with model_with({"top_h": 0.5}, mini_bundle, tmp_path / name) as model:
            assert model.defaults.do_sample is False
    assert len(caplog.records) == 2


def test_the_files_temperature_waits_for_sampling(mini_bundle: Path, tmp_path: Path) -> None:
    config = {"do_sample": False, "temperature": 0.5}
    with model_with(config, mini_bundle, tmp_path / "bundle") as model:
        assert model.options(do_sample=True).temperature == 0.5
        assert model.options(do_sample=True, temperature=None).temperature == 1.0


@pytest.mark.parametrize(
    ("config", "words", "cures"),
    [
        (
            {"do_sample": True, "temperature": 0.0},
            "temperature is 0.0, expected",
            [{"temperature": 0.7}, {"temperature": None}, {"do_sample": False}],
        ),
        (
            {"do_sample": True, "top_k": -1},
            "top_k is -1",
            [{"top_k": 0}, {"top_k": None}, {"do_sample": False}],
        ),
        ({"repetition_penalty": 0}, "repetition_penalty is 0", [{"repetition_penalty": 1.2}]),
        ({"max_new_tokens": 0}, "max_new_tokens is 0", [{"max_new_tokens": 3}, {"max_length": 9}]),
        ({"stop_strings": [""]}, "stop is ''", [{"stop": "x"}, {"stop_strings": "x"}]),
        (
            {"do_sample": True, "num_beams": 4},
            "num_beams is 4 and do_sample is True, but beam search here does not sample",
            [{"do_sample": False}, {"num_beams": 1}],
        ),
        (
            {"min_new_tokens": 9, "max_new_tokens": 4},
            "min_new_tokens is 9",
            [{"min_new_tokens": 0}, {"max_new_tokens": 10}],
        ),
        (
            {"suppress_tokens": [5000]},
            "suppress_tokens names token 5000",
            [{"suppress_tokens": []}],
        ),
        ({"max_time": 5.0}, "max_time is 5.0", [{"max_time": None}]),
        (
            {"encoder_repetition_penalty": 1.2},
            "encoder_repetition_penalty is 1.2",
            [{"encoder_repetition_penalty": None}, {"encoder_repetition_penalty": 1.0}],
        ),
        ({"my_note": "by me"}, "unknown entry 'my_note' ('by me')", [{"my_note": None}]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_entry_is_cured_by_replacing_it(
    config: dict[str, Any],
    words: str,
    cures: list[dict[str, Any]],
    mini_bundle: Path,
    tmp_path: Path,
) -> None:
    limit = {} if "max_new_tokens" in config else {"max_new_tokens": 2}
    with model_with(config, mini_bundle, tmp_path / "bundle") as model:
        for work in (lambda: model.defaults, lambda: model.generate([1, 2, 3], **limit)):
            with pytest.raises(GenerationConfigError) as caught:
                work()
            assert f"generation_config.json: {words}" in str(caught.value)
            assert "with the request" in str(caught.value)
            assert "correct the checkpoint's file" in str(caught.value)
        for cure in cures:
            assert model.generate([1, 2, 3], **(limit | cure)).token_ids
        assert model.generate([1, 2, 3], GenerationOptions(), max_new_tokens=2).token_ids


def test_what_the_request_has_wrong_is_not_blamed_on_the_file(
    mini_bundle: Path, tmp_path: Path
) -> None:
    with model_with({"temperature": 0.0}, mini_bundle, tmp_path / "bundle") as model:
        for bad in (
            {"top_p": 3.0, "do_sample": True, "temperature": 1.0},
            {"num_return_sequences": 3},
            {"num_beams": 2, "do_sample": True, "temperature": 1.0},
            {"suppress_tokens": [5000]},
            {"top_p": 0.5},
            {"max_tokens": 3},
            {"max_time": 3.0},
        ):
            with pytest.raises(RequestError) as caught:
                model.generate([1, 2], **bad)
            assert not isinstance(caught.value, GenerationConfigError)
            assert "generation_config" not in str(caught.value)
        with pytest.raises(GenerationConfigError, match="temperature is 0"):
            model.generate([1, 2], do_sample=True)


def test_stop_strings_of_a_file_without_a_tokenizer(mini_bundle: Path, tmp_path: Path) -> None:
    bare = without_tokenizer(mini_bundle, tmp_path / "bare")
    with model_with({"stop_strings": ["\n"]}, bare, tmp_path / "bundle") as model:
        with pytest.raises(GenerationConfigError, match=r"no tokenizer.*give stop=\(\)"):
            model.generate([1, 2], max_new_tokens=2)
        assert model.generate([1, 2], max_new_tokens=2, stop=()).token_ids


def test_a_models_own_negative_end_is_none() -> None:
    options = GenerationOptions.from_generation_config({}, eos_token_id=(-1, 3))
    assert options.eos_token_id == (3,)


def test_the_command_line_can_leave_the_file_out(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"my_note": "by me", "do_sample": True, "num_beams": 3}
    bundle = bundle_with(config, mini_bundle, tmp_path / "bundle")
    arguments = ["Once upon a time", "--max-new-tokens", "5", "--threads", "1"]
    assert main([str(bundle), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "generation_config.json: unknown entry 'my_note'" in printed.err
    assert main([str(mini_bundle), *arguments]) == 0
    expected = capsys.readouterr().out
    assert main([str(bundle), *arguments, "--no-generation-config"]) == 0
    assert capsys.readouterr().out == expected
    config.pop("my_note")
    bundle = bundle_with(config, mini_bundle, tmp_path / "beams")
    assert main([str(bundle), *arguments]) == 2
    assert "generation_config.json: num_beams is 3" in capsys.readouterr().err
    assert main([str(bundle), *arguments, "--num-beams", "1", "--no-do-sample"]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000])
def test_a_file_that_is_no_json_object(text: str, mini_bundle: Path, tmp_path: Path) -> None:
    files = {"generation_config.json": text}
    bundle = derived_bundle(mini_bundle, tmp_path / "bundle", files)
    with (
        neo_runtime.load(bundle, threads=1) as model,
        pytest.raises(BundleDamagedError, match=r"config\.json (is not valid|contains list, expe)"),
    ):
        model.generate([1, 2], max_new_tokens=1)
