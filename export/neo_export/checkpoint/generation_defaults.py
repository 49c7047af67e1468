"""Checks the generation settings of a checkpoint, as the runtime will read them.

They are in `generation_config.json`, or among the entries of `config.json`: older versions of
transformers wrote them there, and it still reads them from there.

A bundle is written once and read by every request: settings that the runtime refuses would fail
every request. So the export refuses them, while the file can still be corrected, and warns of
settings without effect.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

from neo_runtime.errors import CheckpointError, GenerationConfigError
from neo_runtime.options.generation_options import GenerationOptions

from neo_export.checkpoint.config import CONFIG_NAME
from neo_export.checkpoint.whole import GENERATION_CONFIG_NAME

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_export.checkpoint.whole import Checkpoint

__all__ = ["SETTINGS", "check_generation_defaults", "generation_defaults", "warn_once"]

SETTINGS = frozenset(
    {
        "assistant_early_exit",
        "bad_words_ids",
        "begin_suppress_tokens",
        "constraints",
        "diversity_penalty",
        "do_sample",
        "dola_layers",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "force_words_ids",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "guidance_scale",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "max_time",
        "min_length",
        "min_new_tokens",
        "min_p",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "penalty_alpha",
        "prompt_lookup_num_tokens",
        "remove_invalid_values",
        "renormalize_logits",
        "repetition_penalty",
        "sequence_bias",
        "stop_strings",
        "suppress_tokens",
        "temperature",
        "token_healing",
        "top_h",
        "top_k",
        "top_p",
        "typical_p",
        "use_mtp",
        "watermarking_config",
    }
)
"""Entries of a `config.json` that transformers' `GenerationConfig` takes, and that change texts."""

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LOG = logging.getLogger("neo_export")


@cache
def warn_once(message: str) -> None:
    """Log a warning the first time only: a plan search exports one checkpoint many times."""
    _LOG.warning("%s", message)


def generation_defaults(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Content of the bundle's `generation_config.json`; None if the checkpoint has no settings.

    If the checkpoint lacks that file, the settings come from `config.json`, as in
    `GenerationConfig.from_pretrained`. Token ids alone do not count: the manifest has them.
    """
    if checkpoint.generation_config is not None:
        return checkpoint.generation_config
    config = {key: value for key, value in checkpoint.config_json.items() if value is not None}
    if not config.keys() & SETTINGS:
        return None
    taken = {key: config[key] for key in sorted(config.keys() & SETTINGS)}
    return (
        {"_from_model_config": True} | {key: config[key] for key in _IDS if key in config} | taken
    )


def check_generation_defaults(
    checkpoint: Checkpoint, max_length: int | None = None, warn: Callable[[str], None] = warn_once
) -> None:
    """Refuse settings with which every request would fail.

    Args:
        checkpoint: an open checkpoint.
        max_length: positions that the bundle will have; None for all of the model's.
        warn: called with a message about settings that are ignored or changed.

    Raises:
        CheckpointError: a setting is refused; the message has the file, the entry and the value.
    """
    config = generation_defaults(checkpoint)
    if config is None:
        return
    in_config = checkpoint.generation_config is None
    path = checkpoint.folder / (CONFIG_NAME if in_config else GENERATION_CONFIG_NAME)
    spec = checkpoint.spec
    try:
        options = GenerationOptions.from_generation_config(
            config,
            eos_token_id=spec.eos_token_id,
            model_max_length=max_length or spec.max_position_embeddings,
            vocab_size=spec.vocab_size,
            warn=lambda message: warn(f"{path}: {message}"),
        )
    except GenerationConfigError as error:
        raise _refusal(path, error.problem) from error
    if options.stop and checkpoint.tokenizer_json() is None:
        raise _refusal(path, "stop_strings are given, and the checkpoint has no tokenizer")
    for name, why in options.unread().items():
        warn(
            f"{path}: {name} is {getattr(options, name)!r}, but {why}: it has no effect by default"
        )


def _refusal(path: object, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {problem}. Every request that takes the bundle's defaults would be refused: "
        "correct or remove the entry in that file, and export again"
    )
