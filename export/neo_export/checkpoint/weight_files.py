"""Finds the weight files of a checkpoint folder, and opens the tensors of all of them.

A shard index is untrusted: the files that it names must be inside the folder, so absolute paths,
`..` and subfolders that lead out are refused. A *file* in the folder may itself be a symbolic link
to anywhere: the Hugging Face cache consists of such links (`snapshots/…/x` → `../../blobs/…`), and
links are made by the owner of the folder, not by the index.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from neo_runtime.closable import Closable
from neo_runtime.errors import CheckpointError

from neo_export.checkpoint.config import read_json_object
from neo_export.checkpoint.safetensors_file import SafetensorsFile
from neo_export.checkpoint.torch_file import TorchFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_export.checkpoint.lazy_tensor import LazyTensor

__all__ = ["WEIGHT_FILES", "WeightFiles"]

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files that may hold the weights, in the order of preference (that of transformers)."""


class WeightFiles(Closable):
    """All weight files of one folder, opened.

    Attributes:
        tensors: every tensor, by the name in its file.
    """

    def __init__(self, folder: Path, names: Sequence[str] = WEIGHT_FILES) -> None:
        """Find and open the files.

        Args:
            folder: where they are.
            names: names of weight files or shard indexes; the first that exists is read.

        Raises:
            CheckpointError: there are no weights, or an index or a file is invalid.
            DependencyError: torch is needed and not installed.
        """
        self._files: list[SafetensorsFile | TorchFile] = []
        self.tensors: dict[str, LazyTensor] = {}
        source = next((folder / n for n in names if (folder / n).is_file()), None)
        if source is None:
            raise _no_weights(folder, names)
        try:
            if source.name.endswith(".index.json"):
                self._open_shards(folder, source)
            else:
                self._open(source)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release every file."""
        for file in self._files:
            file.close()

    def _open(self, path: Path) -> SafetensorsFile | TorchFile:
        file = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
        self._files.append(file)
        for name, tensor in file.tensors.items():
            if name in self.tensors:
                raise CheckpointError(
                    f"tensor {name!r} is in {path.name} and in another shard; expected each "
                    "tensor once. Save the checkpoint again into an empty folder"
                )
            self.tensors[name] = tensor
        return file

    def _open_shards(self, folder: Path, index: Path) -> None:
        weight_map = _read_index(index)
        suffix = index.name.removesuffix(".index.json").rpartition(".")[2]
        shards = {name: _shard_path(folder, index, name, suffix) for name in weight_map.values()}
        if missing := sorted(name for name, path in shards.items() if not path.is_file()):
            raise CheckpointError(
                f"{index} names {len(missing)} of {len(shards)} shards that do not exist, the "
                f"first {missing[0]!r}; is the download complete?"
            )
        opened = {name: self._open(path) for name, path in sorted(shards.items())}
        for tensor, shard in weight_map.items():
            if tensor not in opened[shard].tensors:
                raise CheckpointError(
                    f"{index} says that tensor {tensor!r} is in {shard!r}, and it is not there; "
                    "index and shards are of different checkpoints; download or save it again"
                )


def _no_weights(folder: Path, names: Sequence[str]) -> CheckpointError:
    others = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in (".h5", ".msgpack", ".gguf", ".safetensors", ".bin", ".pt", ".pth")
    )
    for name in names:
        if (folder / name).is_symlink():
            return CheckpointError(
                f"{folder / name} is a link to {(folder / name).readlink()}, which is not there; "
                "is the download complete? (Copy a hub's cache with its files: cp -L)"
            )
    found = f"found {', '.join(others[:5])}" if others else "found none"
    if any(name.startswith("adapter_model") for name in others):
        return CheckpointError(
            f"{folder} holds a LoRA adapter ({found}) and no adapter_config.json, which says what "
            "model it belongs to; copy that file as well"
        )
    return CheckpointError(
        f"{folder} has no weights that can be read: {found}, expected one of "
        f"{', '.join(names)}; save the model with save_pretrained"
    )


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointError(
            f"{index} has no usable weight_map (tensor name → file name); download or save the "
            "checkpoint again"
        )
    return weight_map


def _shard_path(folder: Path, index: Path, name: str, suffix: str) -> Path:
    """The path of a shard, after checking that its name stays inside the folder."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    outside = (
        posix.is_absolute() or windows.anchor or ".." in windows.parts or "\0" in name or not name
    )
    path = folder / posix
    if outside or not path.parent.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{index} names the shard {name!r}, which is outside of the checkpoint's folder; "
            "expected plain file names. Do not use this checkpoint if you did not write it"
        )
    if path.suffix != f".{suffix}":
        raise CheckpointError(f"{index} names the shard {name!r}, expected a .{suffix} file")
    return path
