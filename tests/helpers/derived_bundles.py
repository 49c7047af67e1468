"""Copies of a bundle with other text files and a valid manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from neo_runtime.bundle.manifest import FileRecord, Manifest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def derived_bundle(
    source: Path, folder: Path, files: Mapping[str, str | None], **changes: Any
) -> Path:
    """Copy `source` to `folder` with text files replaced, or removed if None."""
    shutil.copytree(source, folder)
    manifest = Manifest.from_json((source / "neo.json").read_text(encoding="utf-8"))
    records = dict(manifest.files)
    for name, text in files.items():
        records.pop(name, None)
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            data = text.encode()
            (folder / name).write_bytes(data)
            records[name] = FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest = replace(manifest, files=records, **changes)
    (folder / "neo.json").write_text(manifest.to_json(), encoding="utf-8")
    return folder


def without_tokenizer(source: Path, folder: Path) -> Path:
    """A copy without a tokenizer, for token ids only."""
    files = {"tokenizer.json": None, "tokenizer_config.json": None}
    return derived_bundle(source, folder, files, has_tokenizer=False)


def bundle_with(config: dict[str, Any], source: Path, folder: Path) -> Path:
    """A copy with another generation_config.json."""
    return derived_bundle(source, folder, {"generation_config.json": json.dumps(config)})
