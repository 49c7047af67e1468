"""Reads what merging needs from a LoRA adapter's `adapter_config.json`, as peft writes it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_runtime.errors import CheckpointError

from neo_export.checkpoint.config import read_json_object

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ADAPTER_CONFIG_NAME", "MERGE_WITH_PEFT", "LoraConfig", "read_adapter_config"]

ADAPTER_CONFIG_NAME = "adapter_config.json"
MERGE_WITH_PEFT = (
    "merge it first with peft: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
    ".save_pretrained(folder), then export that folder"
)

_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that do not change the base model's weights."""
_OF_TRAINING = frozenset(
    {
        "auto_mapping",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
"""Entries about training only, which merging ignores: the result is in the weights."""


@dataclass(frozen=True)
class LoraConfig:
    """How a module's two LoRA matrices are merged into its weight matrix.

    W' = W + s · B A, with s = alpha / r, or alpha / √r for rank-stabilized LoRA (arXiv 2106.09685,
    2312.03732). DoRA (arXiv 2402.09353) then scales each row of W' to a learned length.
    """

    base: str
    """The base model: a folder, or a hub id with its revision."""
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    is_rank_stabilized: bool
    has_magnitudes: bool
    """Whether the adapter is DoRA."""
    modules_to_save: frozenset[str]
    """Last part of the names of modules that were trained in full, as copies."""

    def rank_of(self, module: str) -> int:
        """Rank of a module's matrices."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """The factor s of a module's product B A."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)


def _by_pattern(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    """The first value whose key, as a regular expression, matches the end of the module's name."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise


def read_adapter_config(folder: Path, base: str | None = None) -> LoraConfig:
    """Read the configuration of the adapter in `folder`.

    Args:
        folder: the adapter's folder.
        base: the base model; None for the one that the file names.

    Raises:
        CheckpointError: it is not a LoRA adapter, names no base model, or cannot be merged.
    """
    path = folder / ADAPTER_CONFIG_NAME
    raw = read_json_object(path)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {raw.get('peft_type')!r}, expected 'LORA': only such adapters "
            "can be merged into the model's own matrices"
        )
    _refuse_others(raw, path)
    try:
        config = LoraConfig(
            base=base or _base(raw, path),
            rank=_count(raw["r"]),
            alpha=float(raw["lora_alpha"]),
            rank_pattern={key: _count(n) for key, n in (raw.get("rank_pattern") or {}).items()},
            alpha_pattern={key: float(n) for key, n in (raw.get("alpha_pattern") or {}).items()},
            is_rank_stabilized=bool(raw.get("use_rslora")),
            has_magnitudes=bool(raw.get("use_dora")),
            modules_to_save=frozenset(raw.get("modules_to_save") or ()),
        )
        if not math.isfinite(config.scale_of("a.b")):  # this also compiles the patterns
            raise ValueError(f"lora_alpha is {config.alpha}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
        raise CheckpointError(
            f"{path} is not what peft writes ({type(error).__name__}: {error}); save the adapter "
            "again"
        ) from error
    return config


def _refuse_others(raw: dict[str, Any], path: Path) -> None:
    init = raw.get("init_lora_weights")
    if init not in _KEEP_THE_BASE:
        raise CheckpointError(
            f"{path}: init_lora_weights is {init!r}, which changes the base model as well; "
            f"{MERGE_WITH_PEFT}"
        )
    read = {"peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora"}
    read |= {"use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights", "modules_to_save"}
    for name, value in raw.items():
        if value and name not in read | _OF_TRAINING:
            raise CheckpointError(
                f"{path}: {name} is {value!r}, which cannot be merged here; {MERGE_WITH_PEFT}"
            )


def _base(raw: dict[str, Any], path: Path) -> str:
    base, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{path}: base_model_name_or_path is {base!r}, expected the model that the adapter is "
            "for; give its folder or its hub id with --base"
        )
    is_on_a_hub = isinstance(revision, str) and revision and not Path(base).exists()
    return f"{base}@{revision}" if is_on_a_hub else base


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"a rank is {value!r}")
    return value
