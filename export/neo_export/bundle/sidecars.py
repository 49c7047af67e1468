"""The bundle's files besides graphs and weights: config, tokenizer, generation defaults."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from neo_export.bundle.file_records import copy_file
from neo_export.bundle.genai import genai_config
from neo_export.checkpoint.generation_defaults import generation_defaults
from neo_export.checkpoint.tokenizer_files import warn_of_strangers

if TYPE_CHECKING:
    from pathlib import Path

    from neo_runtime.bundle.manifest import CacheSpec, ModelSpec

    from neo_export.checkpoint.whole import Checkpoint

__all__ = ["write_sidecars"]


def write_sidecars(
    checkpoint: Checkpoint, spec: ModelSpec, cache: CacheSpec, max_length: int, folder: Path
) -> bool:
    """Write everything but graphs, weights and manifest; returns whether there is a tokenizer."""
    _write_json(folder / "config.json", checkpoint.config_json)
    generation = generation_defaults(checkpoint)
    if generation is not None:
        _write_json(folder / "generation_config.json", generation)
    for file in checkpoint.tokenizer_files:
        copy_file(file, folder / file.name)
    tokenizer = checkpoint.tokenizer_json()
    if tokenizer is not None:
        warn_of_strangers(tokenizer, spec.vocab_size, checkpoint.folder)
        (folder / "tokenizer.json").write_bytes(tokenizer)
    if cache.layout != "static":  # onnxruntime-genai does not support static caches
        _write_json(
            folder / "genai_config.json",
            genai_config(spec, cache, max_length, generation),
        )
    return tokenizer is not None


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
