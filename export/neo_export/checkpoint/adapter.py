"""A LoRA adapter; it is merged into the tensors of its base model lazily, when they are read."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from neo_runtime.closable import Closable
from neo_runtime.errors import CheckpointError

from neo_export.checkpoint.adapter_config import MERGE_WITH_PEFT, read_adapter_config
from neo_export.checkpoint.lazy_tensor import FLOAT_DTYPES, LazyTensor
from neo_export.checkpoint.weight_files import WeightFiles
from neo_export.gpt_neo.parameters import EMBEDDING, HEAD, full_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["ADAPTER_FILES", "Adapter"]

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(\.(?P<kind>weight|bias))?"
)


@dataclass(frozen=True)
class _Lora:
    """The adapter's tensors for one module."""

    down: LazyTensor
    """A, [rank, in]."""
    up: LazyTensor
    """B, [out, rank]."""
    scale: float
    magnitudes: LazyTensor | None
    """DoRA's magnitudes, [out]."""
    is_table: bool
    """Whether the module is an embedding, whose matrix is transposed."""

    def merged(self, base: LazyTensor) -> NDArray[np.float32]:
        """The module's matrix with the adapter merged, float32."""
        product = self.scale * (self.up.read() @ self.down.read())
        whole: NDArray[np.float32] = base.read() + (product.T if self.is_table else product)
        if self.magnitudes is not None:
            axis = 0 if self.is_table else 1
            lengths = np.linalg.norm(whole, axis=axis, keepdims=True)
            whole *= self.magnitudes.read().reshape(lengths.shape) / lengths
        return np.ascontiguousarray(whole, np.float32)


class Adapter(Closable):
    """An open adapter: its configuration and its tensors."""

    def __init__(self, folder: Path, base: str | None = None) -> None:
        """Open the files.

        Args:
            folder: the adapter's folder, as peft writes it.
            base: the base model; None for the one that the configuration names.

        Raises:
            CheckpointError: the folder is damaged or not a LoRA adapter that can be merged.
            DependencyError: torch is needed and not installed.
        """
        self.folder = folder
        self.config = read_adapter_config(folder, base)
        self._files = WeightFiles(folder, ADAPTER_FILES)

    def merged(self, base: Mapping[str, LazyTensor], *, is_tied: bool) -> dict[str, LazyTensor]:
        """The tensors that the adapter changes or replaces, by the base model's names.

        Args:
            base: all tensors of the base model, by the names of `GPTNeoForCausalLM`; a tied table
                is there under both names.
            is_tied: whether the embedding is also the head.

        Raises:
            CheckpointError: adapter and base model do not belong together.
        """
        parts, found = self._sorted()
        for name, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)) if is_tied else ():
            # A tied table that peft stored once counts for both names, unless a copy was trained.
            if name in found and not self._is_copy(name):
                found.setdefault(other, found[name])
        for module, own in parts.items():
            # Adapters of `GPTNeoModel` name modules without `transformer.`; patterns do so, too.
            weight, bias = full_name(f"{module}.weight"), full_name(f"{module}.bias")
            before = found.get(weight, base.get(weight))  # peft may store the base weight, too
            if before is None:
                raise self._error(f"has matrices for {module!r}, which the base model has not")
            lora = self._lora(module, own, before)
            found[weight] = LazyTensor(weight, before.shape, "float32", _merger(lora, before))
            if (more := own.get("B.bias")) is not None:
                before = found.get(bias, base.get(bias))
                if before is None:
                    raise self._error(f"has a bias for {module!r}, which the base model has not")
                added = _sum(before, more, lora.scale)
                found[bias] = LazyTensor(bias, before.shape, "float32", added)
        return found

    def _sorted(self) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, LazyTensor]]:
        """Parts of modules, by module and part; and tensors that replace the base model's."""
        parts: dict[str, dict[str, LazyTensor]] = defaultdict(dict)
        whole: dict[str, LazyTensor] = {}
        for name, tensor in self._files.tensors.items():
            if ".original_module." in name:
                continue  # the untrained original, stored besides its trained copy
            plain = name.removeprefix(_PREFIX)
            for wrapped in (".base_layer.", ".modules_to_save."):
                plain = plain.replace(wrapped, ".")
            if tensor.dtype not in FLOAT_DTYPES:
                raise self._error(f"has tensor {name!r} of type {tensor.dtype}")
            match = _PART.fullmatch(plain)
            if match is None:
                plain = full_name(plain)
                whole[plain] = LazyTensor(plain, tensor.shape, tensor.dtype, tensor.load)
            else:
                suffix = ".bias" if match["kind"] == "bias" else ""
                parts[match["module"]][match["part"] + suffix] = tensor
        if not parts and not whole:
            raise self._error("is empty")
        return parts, whole

    def _is_copy(self, weight: str) -> bool:
        return weight.split(".")[-2] in self.config.modules_to_save

    def _lora(self, module: str, own: Mapping[str, LazyTensor], base: LazyTensor) -> _Lora:
        """The tensors of one module, checked."""
        prefix = "embedding_" if "embedding_A" in own else ""
        known = {f"{prefix}A", f"{prefix}B"}
        known |= {"magnitude_vector"} if self.config.has_magnitudes else {"B.bias"}
        if not {f"{prefix}A", f"{prefix}B"} <= own.keys() <= known:
            raise self._error(f"has {', '.join(sorted(own))} of {module!r}, expected A and B")
        down, up = own[f"{prefix}A"], own[f"{prefix}B"]
        rank, shape = self.config.rank_of(module), base.shape[::-1] if prefix else base.shape
        expected = (rank, shape[1]), (shape[0], rank)
        if (down.shape, up.shape) != expected:
            raise self._error(
                f"has matrices of shapes {list(down.shape)} and {list(up.shape)} for {module!r}, "
                f"expected {list(expected[0])} and {list(expected[1])}: rank {rank}, and a base "
                f"model whose matrix is {list(base.shape)}"
            )
        magnitudes = own.get("magnitude_vector")
        if self.config.has_magnitudes and (magnitudes is None or magnitudes.size != shape[0]):
            raise self._error(f"lacks the magnitudes of {module!r} (use_dora), {shape[0]} of them")
        return _Lora(down, up, self.config.scale_of(module), magnitudes, bool(prefix))

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: the adapter {what}; is it an adapter of {self.config.base}? If so, "
            f"{MERGE_WITH_PEFT}"
        )

    def close(self) -> None:
        """Let go of the files."""
        self._files.close()


def _merger(lora: _Lora, base: LazyTensor) -> Callable[[], NDArray[np.float32]]:
    return lambda: lora.merged(base)


def _sum(base: LazyTensor, more: LazyTensor, scale: float) -> Callable[[], NDArray[np.float32]]:
    return lambda: np.asarray(base.read() + scale * more.read(), np.float32)
