from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from neo_runtime.errors import ContextLengthError, RequestError
from neo_runtime.options.checks import check_vocabulary
from neo_runtime.options.generation_options import DEFAULT_MAX_NEW_TOKENS, GenerationOptions
from transformers import GenerationConfig

if TYPE_CHECKING:
    from pathlib import Path


def test_defaults_are_those_of_transformers() -> None:
    options = GenerationOptions()
    defaults = GenerationConfig._get_default_generation_params()
    # The one difference on purpose: see DEFAULT_MAX_NEW_TOKENS.
    assert defaults.pop("max_length") == 20
    shared = {name: value for name, value in defaults.items() if hasattr(options, name)}
    assert len(shared) > 15
    for name, value in shared.items():
        # Where transformers has None for "no such tokens" this runtime has an empty tuple.
        assert getattr(options, name) in (value, () if value is None else value), name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 1e-46),
        ("repetition_penalty", 1e-39),
        ("presence_penalty", 10**400),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -1.0),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 1.01),
        ("top_p", -0.1),
        ("min_p", 2),
        ("typical_p", 0),
        ("epsilon_cutoff", 1),
        ("eta_cutoff", -0.5),
        ("repetition_penalty", 0),
        ("no_repeat_ngram_size", -2),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", "1"),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {1: float("inf")}),
        ("logit_bias", {1: 1e39}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"one": 1.0}),
        ("logit_bias", [1, 2]),
        ("bad_words_ids", [[]]),
        ("bad_words_ids", [1]),
        ("bad_words_ids", ["word"]),
        ("bad_words_ids", [[1, -2]]),
        ("sequence_bias", [[[1, 2]]]),
        ("sequence_bias", [[[1], float("nan")]]),
        ("exponential_decay_length_penalty", [1]),
        ("exponential_decay_length_penalty", [1.5, 1.1]),
        ("min_new_tokens", -1),
        ("max_new_tokens", 0),
        ("max_length", 0),
        ("min_length", 1.5),
        ("eos_token_id", -1),
        ("eos_token_id", "0"),
        ("eos_token_id", 2**63),
        ("eos_token_id", [0, 2**64]),
        ("stop", [""]),
        ("stop", 5),
        ("stop", ["a", "\ud83d"]),
        ("seed", -1),
        ("seed", 1.0),
        ("seed", []),
        ("seed", [1, True]),
        ("num_return_sequences", 0),
        ("logprobs", -1),
        ("logprobs", True),
        ("num_beams", 0),
        ("length_penalty", 99),
        ("early_stopping", "sometimes"),
        ("early_stopping", 1),
        ("ignore_eos", 1),
        ("do_sample", "yes"),
    ],
)
def test_a_bad_value_is_an_error_that_names_the_option_and_what_it_takes(
    name: str, value: Any
) -> None:
    with pytest.raises(RequestError, match=rf"{name}.*expected"):
        GenerationOptions(**{name: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_return_sequences": 2}, "turn do_sample on, or set num_beams"),
        ({"num_beams": 2, "do_sample": True}, "does not sample"),
        ({"num_beams": 2, "num_return_sequences": 3}, r"at most num_beams \(2\)"),
        ({"num_beams": 2, "logprobs": 1}, "logprobs=None or num_beams=1"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens to at most 4"),
        ({"min_length": 5, "max_length": 4}, "min_length to at most 4"),
        ({"forced_eos_token_id": 5, "suppress_tokens": [4, 5]}, "suppressed"),
    ],
)
def test_contradictions_are_errors(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        GenerationOptions(**given)


def test_the_largest_numbers() -> None:
    """Ids are int64 where they meet the logits; seeds have no end."""
    kept = GenerationOptions(eos_token_id=2**63 - 1, seed=[2**63, 2**100])
    assert (kept.eos_token_id, kept.seed) == ((2**63 - 1,), (2**63, 2**100))


def test_the_ends_of_float32_are_numbers() -> None:
    ends = np.finfo(np.float32)
    bias = {1: float(ends.min), 2: ends.max, 3: -1e300, 4: -(10**400), 5: np.float16(0.5)}
    kept = GenerationOptions(logit_bias=bias, temperature=float(ends.tiny), do_sample=True)
    assert list(kept.logit_bias.values()) == [ends.min, ends.max, -np.inf, -np.inf, 0.5]
    assert kept.temperature == ends.tiny
    with pytest.raises(
        RequestError, match=r"temperature is 1e\+39, expected a number that float32"
    ):
        GenerationOptions(temperature=1e39, do_sample=True)
    with pytest.raises(RequestError, match="a bias in logit_bias is array"):
        GenerationOptions(logit_bias={5: np.array([1.0, 2.0])})


def test_values_are_kept_in_one_plain_form() -> None:
    options = GenerationOptions().merged(
        eos_token_id=np.int64(7),
        stop="end",
        bad_words_ids=[np.array([1, 2])],
        logit_bias={"5": -100, np.int32(6): np.float32(0.5)},
        sequence_bias={(1, 2): 3},
        seed=[1, 2],
        top_k=None,
        min_length=None,
    )
    assert options.eos_token_id == (7,)
    assert type(options.eos_token_id[0]) is int
    assert options.stop == ("end",)
    assert options.bad_words_ids == ((1, 2),)
    assert options.logit_bias == {5: -100.0, 6: 0.5}
    assert options.sequence_bias == (((1, 2), 3.0),)
    assert options.seed == (1, 2)
    assert options.top_k is None
    assert options.min_length == 0


def test_a_temperature_of_zero_says_how_to_decode_greedily() -> None:
    with pytest.raises(RequestError, match="for greedy decoding set do_sample=False"):
        GenerationOptions(do_sample=True, temperature=0)


def test_a_file_gives_the_defaults() -> None:
    text = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_k=40,
        repetition_penalty=1.1,
        max_new_tokens=9,
        eos_token_id=[2, 3],
        bos_token_id=1,
        pad_token_id=0,
        bad_words_ids=[[4, 5]],
        sequence_bias=[[[6], -2.5]],
        stop_strings=["\n\n"],
        suppress_tokens=[8],
    ).to_json_string(use_diff=False)
    options = GenerationOptions.from_generation_config(json.loads(text), eos_token_id=(9,))
    assert options == GenerationOptions(
        do_sample=True,
        temperature=0.7,
        top_k=40,
        repetition_penalty=1.1,
        max_new_tokens=9,
        eos_token_id=(2, 3),
        bad_words_ids=((4, 5),),
        sequence_bias=(((6,), -2.5),),
        stop=("\n\n",),
        suppress_tokens=(8,),
    )


def test_a_file_without_eos_gets_the_models() -> None:
    options = GenerationOptions.from_generation_config({"top_k": None}, eos_token_id=(9,))
    assert (options.eos_token_id, options.top_k) == ((9,), 50)


def test_a_files_max_length_is_lowered_to_the_bundles() -> None:
    options = GenerationOptions.from_generation_config({"max_length": 2048}, model_max_length=512)
    assert options.max_length == 512


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("guidance_scale", 1.5),
        ("diversity_penalty", 0.5),
        ("num_beam_groups", 2),
        ("encoder_repetition_penalty", 1.2),
        ("encoder_no_repeat_ngram_size", 3),
        ("penalty_alpha", 0.6),
        ("dola_layers", "high"),
        ("assistant_early_exit", 2),
        ("watermarking_config", {"bias": 2.0}),
        ("forced_bos_token_id", 1),
        ("force_words_ids", [[1]]),
        ("token_healing", True),
        ("max_time", 2.0),
        ("use_mtp", True),
        ("an_option_of_tomorrow", 1),
    ],
)
def test_an_unsupported_entry_is_an_error_that_names_it(key: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"{key}.*file"):
        GenerationOptions.from_generation_config({key: value})
    assert GenerationOptions.from_generation_config({key: None}) == GenerationOptions()


def test_an_unsupported_entry_of_sampling_is_an_error_where_tokens_are_drawn() -> None:
    file = {"do_sample": True, "top_h": 0.4}
    with pytest.raises(RequestError, match=r"top_h.*file"):
        GenerationOptions.from_generation_config(file)
    with pytest.raises(RequestError, match=r"top_h.*file"):
        GenerationOptions.from_generation_config({"top_h": 0.4}, overrides={"do_sample": True})
    assert GenerationOptions.from_generation_config(file, overrides={"do_sample": False}) == (
        GenerationOptions()
    )


def test_every_entry_that_transformers_writes_is_known() -> None:
    everything = dict.fromkeys(json.loads(GenerationConfig().to_json_string(use_diff=False)), "x")
    everything |= dict.fromkeys(GenerationConfig._get_default_generation_params(), "x")
    for key in everything:
        try:
            GenerationOptions.from_generation_config({key: "x"})
        except RequestError as error:
            assert "unknown entry" not in str(error), key  # noqa: PT017


def test_neutral_entries_pass() -> None:
    defaults = GenerationConfig._get_default_generation_params()
    defaults |= {"guidance_scale": 1.0, "use_cache": False, "cache_implementation": "static"}
    defaults |= {"transformers_version": "4.2", "_from_model_config": True, "bos_token_id": 3}
    options = GenerationOptions.from_generation_config(defaults)
    assert options == GenerationOptions(max_length=20)


def test_a_bad_value_in_a_file_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"generation_config\.json: top_p is 7"):
        GenerationOptions.from_generation_config({"do_sample": True, "top_p": 7})
    with pytest.raises(RequestError, match=r"generation_config\.json: repetition_penalty is 0"):
        GenerationOptions.from_generation_config({"repetition_penalty": 0})


def test_merging_overrides_the_defaults_and_leaves_them_alone() -> None:
    defaults = GenerationOptions(do_sample=True, temperature=0.5, top_p=0.9)
    merged = defaults.merged(temperature=0.8, stop_strings=["."])
    assert (merged.temperature, merged.top_p, merged.stop) == (0.8, 0.9, (".",))
    assert defaults.temperature == 0.5
    assert defaults.merged(do_sample=False).top_p == 0.9


def test_an_unknown_option_is_an_error_with_the_closest_name() -> None:
    with pytest.raises(RequestError, match=r"'temprature'; did you mean 'temperature'\?"):
        GenerationOptions().merged(temprature=0.5)
    with pytest.raises(RequestError, match=r"known: .*top_p"):
        GenerationOptions().merged(zzz=1)
    with pytest.raises(RequestError, match="give one of them"):
        GenerationOptions().merged(stop="a", stop_strings="b")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.5}, "turn do_sample on"),
        ({"top_k": 10}, "turn do_sample on"),
        ({"length_penalty": 2.0}, "set num_beams above 1"),
        ({"early_stopping": True}, "set num_beams above 1"),
    ],
)
def test_an_option_that_would_be_ignored_is_an_error(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        GenerationOptions().merged(**given)


def test_options_that_change_nothing_are_no_error() -> None:
    GenerationOptions().merged(temperature=1.0, top_k=0, top_p=1.0, min_p=None, seed=3)


def test_a_length_of_the_call_replaces_the_other_kind_of_the_file() -> None:
    file = GenerationOptions(max_new_tokens=5, min_new_tokens=2)
    assert file.merged(max_length=30).total_length(10, 64) == 30
    assert file.merged(min_length=30).minimum_length(10) == 30
    assert file.merged(max_length=None).total_length(10, 64) == 15
    file = GenerationOptions(max_length=30, min_length=20)
    assert file.merged(max_new_tokens=3, min_new_tokens=1).total_length(10, 64) == 13
    assert file.merged(min_new_tokens=1).minimum_length(10) == 11


def test_lengths() -> None:
    assert GenerationOptions().total_length(10, 2048) == 10 + DEFAULT_MAX_NEW_TOKENS
    assert GenerationOptions().total_length(10, 64) == 64
    assert GenerationOptions(max_new_tokens=54).total_length(10, 64) == 64
    assert GenerationOptions(max_new_tokens=2, max_length=64).total_length(10, 64) == 12
    assert GenerationOptions(max_length=64).total_length(10, 64) == 64
    with pytest.raises(ContextLengthError, match="set max_new_tokens to at most 54"):
        GenerationOptions(max_new_tokens=55).total_length(10, 64)
    with pytest.raises(ContextLengthError, match="set max_length to at most 64"):
        GenerationOptions(max_length=65).total_length(10, 64)
    with pytest.raises(ContextLengthError, match="shorten the prompt"):
        GenerationOptions().total_length(64, 64)
    with pytest.raises(RequestError, match="the prompt alone has 10"):
        GenerationOptions(max_length=10).total_length(10, 64)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {11: 1.0}),
        ("bad_words_ids", [[0, 11]]),
        ("sequence_bias", [[[11], 1.0]]),
        ("suppress_tokens", [11]),
        ("begin_suppress_tokens", [11]),
        ("forced_eos_token_id", 11),
    ],
)
def test_token_ids_outside_the_vocabulary_are_errors(name: str, value: Any) -> None:
    options = GenerationOptions(**{name: value})
    check_vocabulary(options, 12)
    with pytest.raises(RequestError, match=rf"{name} names token 11.*0 to 10"):
        check_vocabulary(options, 11)


def test_ignore_eos() -> None:
    assert GenerationOptions(eos_token_id=(1,)).active_eos == (1,)
    assert GenerationOptions(eos_token_id=(1,), ignore_eos=True).active_eos == ()


def test_a_models_own_end_of_sequence_holds(mini_bundle: Path) -> None:
    """As in transformers, unless others are given: `ignore_eos` is for those who want none."""
    with neo_runtime.load(mini_bundle, threads=1) as model:
        [eos] = model.manifest.model.eos_token_id
        wanted: dict[str, Any] = {"logit_bias": {eos: 99.0}}
        for options in (GenerationOptions(max_new_tokens=5), model.options(max_new_tokens=5)):
            assert model.generate("a", options, **wanted).token_ids == (eos,)
            assert model.generate("a", options, eos_token_id=None, **wanted).token_ids == (eos,)
            assert len(model.generate("a", options, eos_token_id=(), **wanted).token_ids) == 5
            assert len(model.generate("a", options, ignore_eos=True, **wanted).token_ids) == 5


def test_beams_with_a_form_end_by_the_models_own(mini_bundle: Path) -> None:
    with neo_runtime.load(mini_bundle, threads=1) as model:
        form: dict[str, Any] = {"grammar": model.grammar(choices=["yes", "no"]), "num_beams": 2}
        expected = model.generate("a", **form).text
        assert model.generate("a", GenerationOptions(**form)).text == expected
        assert model.generate("a", GenerationOptions(), **form).text == expected
        for none in ({"eos_token_id": ()}, {"ignore_eos": True}):
            with pytest.raises(RequestError, match="there is no eos_token_id"):
                GenerationOptions(**form, **none)
            with pytest.raises(RequestError, match="there is no eos_token_id"):
                model.generate("a", **form, **none)
        spec = dataclasses.replace(model.manifest.model, eos_token_id=())
        model.manifest = dataclasses.replace(model.manifest, model=spec)
        with pytest.raises(RequestError, match="there is no eos_token_id"):
            model.generate("a", GenerationOptions(**form))


def test_names_of_transformers_that_stand_for_nothing_here() -> None:
    options = GenerationOptions()
    assert options.merged(num_beam_groups=1, max_time=None, guidance_scale=1.0) == options
    with pytest.raises(RequestError, match="unknown generation option 'num_beam_groups'"):
        options.merged(num_beam_groups=2)
    with pytest.raises(RequestError, match="'pad_token_id'; nothing is padded"):
        options.merged(pad_token_id=0)
    with pytest.raises(RequestError, match="'use_cache'; there is always a cache"):
        options.merged(use_cache=True)


def test_flags_of_numpy() -> None:
    assert GenerationOptions(do_sample=np.True_).do_sample is True  # type: ignore[arg-type]
    for wrong in (1, "yes", np.array([True]), np.int64(1)):
        with pytest.raises(RequestError, match="expected True or False"):
            GenerationOptions(do_sample=wrong)  # type: ignore[arg-type]
