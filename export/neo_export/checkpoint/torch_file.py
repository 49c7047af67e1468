"""A `pytorch_model.bin` (or a shard of one), through `torch.load`; torch is optional."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neo_runtime.errors import CheckpointError, DependencyError

from neo_export.checkpoint.lazy_tensor import LazyTensor, numpy_dtype

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

__all__ = ["TorchFile"]


class TorchFile:
    """The tensors of one file.

    Files in torch's zip format (since 1.6) are memory-mapped; older ones cannot be, and are held
    in private memory until `close`.

    Attributes:
        path: the file.
        tensors: its tensors, by their names in the file.
    """

    def __init__(self, path: Path) -> None:
        """Load the file's structure, tensors only: no code in it runs (`weights_only=True`).

        Raises:
            CheckpointError: the file cannot be read, or holds something other than tensors.
            DependencyError: torch is not installed.
        """
        self.path = path
        self._state: dict[str, Any] | None = _load(path)
        self.tensors: dict[str, LazyTensor] = {
            name: self._tensor(name, value) for name, value in self._state.items()
        }

    def close(self) -> None:
        """Release the file; reading a tensor afterwards raises `ValueError`."""
        self._state = None

    def _tensor(self, name: str, value: Any) -> LazyTensor:
        dtype = str(value.dtype).removeprefix("torch.")

        def load() -> npt.NDArray[Any]:
            import torch

            if self._state is None:
                raise ValueError(f"{self.path} is closed")
            tensor = self._state[name].detach().contiguous()
            if dtype == "bfloat16":  # not a type of numpy itself
                return _array(tensor.view(torch.int16)).view(numpy_dtype(dtype))
            return _array(tensor)

        return LazyTensor(name, tuple(value.shape), dtype, load)


def _array(tensor: Any) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.numpy()
    return array.view()  # the caller may change the flags of a view


def _load(path: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise DependencyError(
            f"{path} is in PyTorch's format and torch is not installed; run "
            "`pip install 'neo-onnx[torch]'`, or save the checkpoint as safetensors"
        ) from error
    try:
        with path.open("rb") as file:
            magic = file.read(8)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if magic == b"version ":
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
        )
    try:
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=magic.startswith(b"PK\x03\x04")
        )
    except Exception as error:  # on damaged bytes, torch and pickle may raise anything
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{path} cannot be loaded as PyTorch weights ({type(error).__name__}: {reason}); it "
            "is damaged, or holds more than tensors, which is refused because loading it could "
            "run code. Save the checkpoint again, as safetensors"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__}, expected a state dict (name → tensor)"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path}: entry {name!r} is a {type(value).__name__}, expected a tensor; save "
                "model.state_dict() itself, or use model.save_pretrained(folder)"
            )
        if value.layout != torch.strided:
            raise CheckpointError(f"{path}: tensor {name!r} is sparse, expected a dense one")
    return state
