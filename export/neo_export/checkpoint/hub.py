"""Resolves MODEL on the command line to a folder: a local one, or a download from a hub.

Each hub is reached through its own client library, which also manages the cache, the credentials,
the retries and the progress bars.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from neo_runtime.errors import CheckpointError, DependencyError, HubError, OutputError

from neo_export.checkpoint.adapter import ADAPTER_FILES
from neo_export.checkpoint.tokenizer_files import TOKENIZER_FILES

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["resolve_model", "resolve_tokenizer"]

MODELSCOPE_PREFIX = "modelscope:"

_HUB_ID = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII
)
_SMALL_FILES = ("config.json", "generation_config.json", "adapter_config.json", *TOKENIZER_FILES)
# Tried in this order until one exists: a repository often has its weights in several formats.
_WEIGHT_PATTERNS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*.bin"),
    *((name,) for name in ADAPTER_FILES),
)

_Snapshot: TypeAlias = "Callable[[list[str]], str]"
"""Downloads the files that match the patterns; returns their folder."""


def resolve_model(model: str) -> Path:
    """Resolve the name that the user gave for the model to a folder.

    Args:
        model: an existing folder; a Hugging Face id `owner/name` or `owner/name@revision`; or
            `modelscope:owner/name`, optionally with `@revision`, too.

    Returns:
        The folder with `config.json`, the weights in one format and the tokenizer's files. Only
        those are downloaded.

    Raises:
        CheckpointError: the name is neither a folder nor a hub id.
        DependencyError: the hub's client library is not installed.
        HubError: the hub cannot be reached, has no such model, or denies access to it.
        OutputError: the disk is full.
    """
    return _resolve(model, _download_model)


def resolve_tokenizer(model: str) -> Path:
    """Resolve the name of a model to a folder with its tokenizer; downloads nothing else.

    Raises:
        NeoError: as for `resolve_model`.
    """
    return _resolve(model, lambda snapshot: Path(snapshot(list(TOKENIZER_FILES))))


def _resolve(model: str, download: Callable[[_Snapshot], Path]) -> Path:
    if model.startswith(MODELSCOPE_PREFIX):
        match = _HUB_ID.fullmatch(model.removeprefix(MODELSCOPE_PREFIX))
        if match is None:
            raise CheckpointError(
                f"{model!r} is not a ModelScope id; expected {MODELSCOPE_PREFIX}owner/name or "
                f"{MODELSCOPE_PREFIX}owner/name@revision"
            )
        return _from_modelscope(match["id"], match["revision"], download)
    path = _local_path(model)
    if path is not None and path.is_dir():
        return path
    if path is not None:
        raise CheckpointError(
            f"{model} is a file; expected the folder that holds config.json and the weights"
        )
    match = _HUB_ID.fullmatch(model)
    if match is None:
        raise CheckpointError(
            f"{model!r} does not exist; expected a Hugging Face model folder, a hub id such as "
            f"EleutherAI/gpt-neo-1.3B, or {MODELSCOPE_PREFIX}AI-ModelScope/gpt-neo-1B3"
        )
    return _from_hugging_face(match["id"], match["revision"], download)


def _local_path(model: str) -> Path | None:
    """The folder or file of that name, if there is one."""
    try:
        path = Path(model).expanduser()
        return path if model and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # name too long, NUL byte, no such home directory
        return None


def _from_hugging_face(
    model_id: str, revision: str | None, download: Callable[[_Snapshot], Path]
) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise DependencyError(
            f"{model_id!r} is not a folder here, and huggingface_hub, which could download it, "
            f"is not installed ({error}); run `pip install 'neo-onnx[hub]'`, or give a folder"
        ) from error
    try:
        return download(
            lambda patterns: huggingface_hub.snapshot_download(
                model_id, revision=revision, allow_patterns=patterns
            )
        )
    except Exception as error:  # the library passes on its HTTP client's errors
        raise _hugging_face_error(model_id, revision, error) from error


def _from_modelscope(
    model_id: str, revision: str | None, download: Callable[[_Snapshot], Path]
) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise DependencyError(
            f"{MODELSCOPE_PREFIX}{model_id} needs the package modelscope, which cannot be "
            f"imported ({error}); run `pip install 'neo-onnx[modelscope]'`"
        ) from error
    try:
        return download(
            lambda patterns: snapshot_download(
                model_id, revision=revision, allow_file_pattern=patterns
            )
        )
    except Exception as error:  # the library's errors have no common base across its versions
        _raise_if_disk_full(error, "MODELSCOPE_CACHE")
        raise HubError(
            f"{model_id} cannot be downloaded from ModelScope ({_brief(error)}); check the id and "
            "the network, set MODELSCOPE_API_TOKEN if it is private, or download it elsewhere and "
            "give the folder"
        ) from error


def _download_model(snapshot: _Snapshot) -> Path:
    """Fetch the small files, and the weights in the first format that the repository has."""
    folder = Path()
    for patterns in _WEIGHT_PATTERNS:
        folder = Path(snapshot([*_SMALL_FILES, *patterns]))
        if (folder / patterns[0]).is_file():
            break
    return folder  # even without weights: `open_checkpoint` reports what is missing


def _hugging_face_error(model_id: str, revision: str | None, error: Exception) -> HubError:
    """The error for a known failure, with its remedy."""
    from huggingface_hub import errors

    _raise_if_disk_full(error, "HF_HOME")
    where = f"{model_id} on the Hugging Face hub"
    if isinstance(error, errors.GatedRepoError):  # checked before its base class, "not found"
        return HubError(
            f"{where} is gated; accept its terms on https://huggingface.co/{model_id}, then log in "
            "with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{where} has no revision {revision!r}; expected a branch, tag or commit")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"{model_id} is neither a folder here nor a public model on the Hugging Face hub; "
            "check the name, and set HF_TOKEN if the model is private"
        )
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{model_id!r} is not a valid Hugging Face id ({_brief(error)})")
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        if _offline():
            return HubError(
                f"{where}: not in the local cache, and HF_HUB_OFFLINE is set; unset it, or "
                "download the model first, or give a folder"
            )
        return HubError(
            f"{where} cannot be reached and is not in the local cache; check the network (or the "
            "proxy), or download the model elsewhere and give the folder"
        )
    return HubError(
        f"{where} cannot be downloaded ({_brief(error)}); check the network and try again, or "
        "download the model elsewhere and give the folder"
    )


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _raise_if_disk_full(error: BaseException, cache_variable: str) -> None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise OutputError(
            f"the download does not fit on the disk ({os.strerror(error.errno)}); free some "
            f"space, or set {cache_variable} to a folder on another disk"
        ) from error


def _brief(error: BaseException) -> str:
    """Type and first line of a foreign error."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
