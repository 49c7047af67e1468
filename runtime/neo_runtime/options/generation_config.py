"""Which entries of a Hugging Face `generation_config.json` are honoured, and which are refused.

The file holds the settings of the model's authors, so silently ignoring an entry would change the
model's text. Every entry is one of three: an option of this runtime, an entry that cannot change
the text (the kind of cache, what `generate` returns …), or an error that names it.
Names and neutral values: transformers 5, `GenerationConfig` and `_get_default_generation_params`.

Entries that a request replaces are not checked: a file with one bad entry serves every request
that replaces it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neo_runtime.errors import GenerationConfigError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from neo_runtime.options.values import Check

__all__ = [
    "GENERATION_CONFIG",
    "checked_entries",
    "file_error",
    "foreign_entries",
    "supported_entries",
    "usable_entries",
]

GENERATION_CONFIG = "generation_config.json"

# Cannot change which tokens a decoder-only model generates, whatever their value.
_IRRELEVANT = frozenset(
    {
        "_commit_hash",
        "_from_model_config",
        "_name_or_path",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "decoder_start_token_id",
        "disable_compile",
        "is_assistant",
        "low_memory",
        "max_cache_len",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "prefill_chunk_size",
        "return_dict",
        "return_dict_in_generate",
        "return_legacy_cache",
        "transformers_version",
        "use_cache",
        # Read only with an assistant model, which a file cannot give.
        "assistant_confidence_threshold",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "prompt_lookup_num_tokens",  # changes no text
        "speculation_type",
        "target_lookbehind",
    }
)

# Not supported; an entry with one of these values (or null) has no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "token_healing": (False,),
    "top_h": (),
    "use_mtp": (False,),
    "watermarking_config": (),
}

# Entries of `_NEUTRAL` that only sampling reads.
_OF_SAMPLING = frozenset({"top_h"})


def file_error(problem: str, *names: str) -> GenerationConfigError:
    """An error that names the file, and says how a request can replace the value.

    Args:
        problem: what was found and what was expected.
        names: options that a request can give instead.
    """
    instead = " or ".join(names) or "another value"
    error = GenerationConfigError(
        f"{GENERATION_CONFIG}: {problem}; give {instead} with the request (or GenerationOptions, "
        "which leave the file out), or correct the checkpoint's file and export again"
    )
    error.problem = problem
    return error


def foreign_entries(overrides: Mapping[str, Any], config: Mapping[str, Any]) -> set[str]:
    """Names in a request that are not options here, given to drop an entry of the file.

    Their value is None, as in `max_time=None` (also accepted by transformers), or neutral.
    """
    return {
        name
        for name, value in overrides.items()
        if (name in _NEUTRAL and (value is None or value in _NEUTRAL[name]))
        or (name in config and value is None)
    }


def supported_entries(
    config: Mapping[str, Any],
    options: Collection[str],
    aliases: Mapping[str, str],
    *,
    replaced: Collection[str],
    samples: bool,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """The entries of `config` that set an option, under the option's name.

    Args:
        config: the parsed file.
        options: names of the runtime's options.
        aliases: other names for some of them.
        replaced: names that the request gives itself.
        samples: whether the request samples.
        warn: called with a message about each entry ignored because the request does not read it.

    Raises:
        GenerationConfigError: an entry that is not supported has a value that changes the result,
            or the entry is unknown.
    """
    entries: dict[str, Any] = {}
    for key, value in config.items():
        name = aliases.get(key, key)
        if value is None or key in _IRRELEVANT or name in replaced:
            continue
        if name in options:
            entries[name] = value
        elif key not in _NEUTRAL:
            raise file_error(
                f"unknown entry {key!r} ({value!r}), which may change the text that the model "
                "generates, so that it has to be removed or null",
                f"{key}=None",
            )
        elif value not in _NEUTRAL[key]:
            neutral = [repr(item) for item in _NEUTRAL[key]] + ["null"]
            problem = f"{key} is {value!r}, which is not supported, expected {' or '.join(neutral)}"
            if key not in _OF_SAMPLING or samples:
                raise file_error(problem, f"{key}=None")
            warn(f"{problem}; ignored, as greedy decoding does not read it")
    return entries


def usable_entries(
    entries: Mapping[str, Any],
    eos_token_id: Collection[int],
    model_max_length: int | None,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """The entries, with end-of-sequence ids and length limits adapted to this bundle.

    Args:
        entries: by the options' names.
        eos_token_id: the model's own ids, for a file that has none.
        model_max_length: positions of the bundle; a higher limit in the file is lowered to it.
        warn: called with a message about each change, except of `max_length`.
    """
    usable = dict(entries)
    if "eos_token_id" not in usable and eos_token_id:
        usable["eos_token_id"] = [i for i in eos_token_id if i >= 0]
    eos = usable.get("eos_token_id", [])
    ids = eos if isinstance(eos, list | tuple) else [eos]
    if any(type(i) is int and i < 0 for i in ids):
        usable["eos_token_id"] = [i for i in ids if type(i) is not int or i >= 0]
        warn(f"eos_token_id is {eos!r}; a negative id is no token, and ends nothing")
    for name in ("max_length", "max_new_tokens"):
        limit = usable.get(name)
        if model_max_length is None or type(limit) is not int or limit <= model_max_length:
            continue
        usable["max_length"] = model_max_length
        if name == "max_new_tokens":
            del usable[name]
            warn(f"{name} is {limit}; the bundle has {model_max_length} positions, prompt included")
    return usable


def checked_entries(
    entries: Mapping[str, Any],
    checks: Mapping[str, Check],
    unread: Callable[[str], str | None],
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """The entries, validated.

    Args:
        entries: by the options' names.
        checks: the check of each option.
        unread: option → why the request does not read it; None if it does. An invalid value of an
            unread option is ignored, as in transformers: another request may replace it.
        warn: called with a message about each value that is ignored.

    Raises:
        GenerationConfigError: a value that the request reads is invalid.
    """
    checked: dict[str, Any] = {}
    for name, value in entries.items():
        try:
            checked[name] = checks[name](name, value)
        except RequestError as error:
            why = unread(name)
            if why is None:
                raise file_error(str(error), name) from error
            warn(f"{error}; ignored, as {why}")
    return checked
