"""Which entries of a Hugging Face `generation_config.json` are honoured, and which are refused.

The file holds the settings of the model's authors, so silently ignoring an entry would change the
model's text. Every entry is one of three: an option of this runtime, an entry that
cannot change the text (a cache's kind, what `generate` returns …), or an error that names it.
Names and neutral values: transformers 5, `GenerationConfig` and `_get_default_generation_params`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Set

__all__ = ["supported_entries"]

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
        # Read only where an assistant model is given, which a file cannot do.
        "assistant_confidence_threshold",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "speculation_type",
        "target_lookbehind",
    }
)

# Not supported; with one of these values (or null) the entry changes nothing.
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
    "prompt_lookup_num_tokens": (),
    "token_healing": (False,),
    "top_h": (),
    "use_mtp": (False,),
    "watermarking_config": (),
}


def supported_entries(
    config: Mapping[str, Any], options: Set[str], aliases: Mapping[str, str]
) -> dict[str, Any]:
    """The entries of `config` that set an option, under the option's name.

    Args:
        config: the parsed file.
        options: names of the runtime's options.
        aliases: other names for some of them.

    Raises:
        RequestError: an entry that is not supported has a value that changes the result, or the
            entry is unknown.
    """
    entries: dict[str, Any] = {}
    for key, value in config.items():
        name = aliases.get(key, key)
        if value is None or key in _IRRELEVANT:
            continue
        if name in options:
            entries[name] = value
        elif key not in _NEUTRAL:
            raise RequestError(
                f"generation_config.json: unknown entry {key!r} ({value!r}), which may change "
                "the text that the model generates; remove it from the checkpoint's file (or set "
                "it to null) and export again"
            )
        elif value not in _NEUTRAL[key]:
            neutral = [repr(item) for item in _NEUTRAL[key]] + ["null"]
            raise RequestError(
                f"generation_config.json: {key} is {value!r}, which is not supported, expected "
                f"{' or '.join(neutral)}; remove the entry from the checkpoint's file and export "
                "again"
            )
    return entries
