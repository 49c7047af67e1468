"""A checkpoint's `generation_config.json`, looked at as the runtime will read it.

A bundle is written once and read by every request: what the runtime refuses in the file, it would
refuse each time. So the export refuses it, while the file can still be corrected, and says what
of it has no effect.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

from neo_runtime.errors import CheckpointError, GenerationConfigError
from neo_runtime.options import GenerationOptions

from neo_export.checkpoint import GENERATION_CONFIG_NAME

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_export.checkpoint import Checkpoint

__all__ = ["check_generation_defaults", "warn_once"]

_LOG = logging.getLogger("neo_export")


@cache
def warn_once(message: str) -> None:
    """A warning in the log, the first time only: a search exports one checkpoint many times."""
    _LOG.warning("%s", message)


def check_generation_defaults(
    checkpoint: Checkpoint, max_length: int | None = None, warn: Callable[[str], None] = warn_once
) -> None:
    """Refuse what no request could take as it stands.

    Args:
        checkpoint: an opened one.
        max_length: positions that the bundle will have, by default all of the model's.
        warn: is told of what is there and not taken as it is.

    Raises:
        CheckpointError: names file, entry and value.
    """
    if checkpoint.generation_config is None:
        return
    path = checkpoint.folder / GENERATION_CONFIG_NAME
    spec = checkpoint.spec
    try:
        options = GenerationOptions.from_generation_config(
            checkpoint.generation_config,
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
