"""Files in a bundle's folder that are not the bundle's: replacing the bundle would delete them."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING

from neo_runtime.bundle.engine_record import ENGINES_FOLDER
from neo_runtime.bundle.manifest import MANIFEST_NAME
from neo_runtime.json_input import parse_json

from neo_export.checkpoint.tokenizer_files import TOKENIZER_FILES
from neo_export.files.lost_files import files_inside

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["foreign_files"]

_USUAL = ("weights.bin", "config.json", "generation_config.json", "genai_config.json")
_BUILT = re.compile(
    rf"{ENGINES_FOLDER}/([^/]+\.(plan|kernels|json)(\.\d+)?|\.?timing\.cache(\.\d+)?)"
)
"""Files of neo-engine and neo-kernels; they have a number at the end while being written."""
_LEFT_BY_THE_SYSTEM = {".DS_Store"}


def foreign_files(bundle: Path) -> list[str]:
    """Paths inside `bundle` that its manifest does not list, sorted; links are not followed.

    Plans and kernels in `engines/`, with their records and timings, belong to the bundle. Empty
    folders do not count. If the manifest is damaged, the usual files of an export count as listed:
    a damaged bundle may be replaced, too.

    Raises:
        OSError: a folder cannot be read.
    """
    listed = _listed(bundle)
    return sorted(
        path
        for path in files_inside(bundle)
        if path not in listed
        and not _BUILT.fullmatch(path)
        and path.rpartition("/")[2] not in _LEFT_BY_THE_SYSTEM
    )


def _listed(bundle: Path) -> set[str]:
    """Names in the manifest, of any schema version and without validation."""
    listed = {MANIFEST_NAME, *_USUAL, *TOKENIZER_FILES}
    with suppress(ValueError, FileNotFoundError):
        raw = parse_json((bundle / MANIFEST_NAME).read_bytes())
        if isinstance(raw, dict) and isinstance(raw.get("files"), dict):
            return {MANIFEST_NAME, *raw["files"]}
    return listed | {path.name for path in bundle.glob("*.onnx")}
