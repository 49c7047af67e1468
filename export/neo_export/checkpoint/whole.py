"""Opens the folder of a whole GPT-Neo: its checked configuration and lazily loaded tensors.

Tensors have the names of `GPTNeoForCausalLM`, whatever class wrote the file.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neo_runtime.closable import Closable
from neo_runtime.errors import CheckpointError

from neo_export.checkpoint.config import CONFIG_NAME, read_config, read_json_object
from neo_export.checkpoint.lazy_tensor import FLOAT_DTYPES, LazyTensor
from neo_export.checkpoint.tokenizer_files import find_tokenizer_files, read_tokenizer_json
from neo_export.checkpoint.weight_files import WeightFiles
from neo_export.gpt_neo.parameters import EMBEDDING, HEAD, expected_shapes, full_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from neo_runtime.bundle.manifest import ModelSpec

__all__ = ["Checkpoint", "match_tensors", "open_whole", "read_generation_config"]

GENERATION_CONFIG_NAME = "generation_config.json"

# Buffers that old versions of transformers stored: the causal mask and the value of a masked score.
_OLD_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.attention\.(bias|masked_bias)")
_OTHER_HEADS = ("score.", "classifier.", "qa_outputs.")
_ADAPTER_MARKS = ("lora_", "base_layer.", "base_model.model.")
_QUANTIZED_MARKS = (".SCB", ".absmax", ".quant_state", ".qweight", ".qzeros", ".weight_format")


@dataclass(frozen=True, eq=False)
class Checkpoint(Closable):
    """An open checkpoint: everything but the values of the tensors is read and checked."""

    folder: Path
    spec: ModelSpec
    """The architecture."""
    tensors: Mapping[str, LazyTensor]
    """The tensors of `expected_shapes(spec)`, in that order, with those shapes; float32, float16 or
    bfloat16. Only tensors that the caller keeps take private memory."""
    config_json: dict[str, Any]
    """`config.json`, unchanged."""
    generation_config: dict[str, Any] | None
    """`generation_config.json`, unchanged; None if there is none."""
    tokenizer_folder: Path
    """The folder of the tokenizer's files."""
    files: tuple[Closable, ...]
    """Owners of the memory-mapped files."""

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        """The tokenizer's files that exist."""
        return find_tokenizer_files(self.tokenizer_folder)

    def tokenizer_json(self) -> bytes | None:
        """Content of a `tokenizer.json`, built from `vocab.json` and `merges.txt` if only those
        exist; None for a checkpoint without a tokenizer.

        Raises:
            CheckpointError: the tokenizer's files cannot be used.
        """  # noqa: D205
        return self._tokenizer_json

    @functools.cached_property
    def _tokenizer_json(self) -> bytes | None:
        # Cached, so that its warnings appear once.
        return read_tokenizer_json(self.tokenizer_folder)

    def close(self) -> None:
        """Release the files. Arrays that were read stay valid."""
        for file in self.files:
            file.close()


def open_whole(folder: Path) -> Checkpoint:
    """Open and check the folder of a whole model, as `open_checkpoint` does.

    Raises:
        CheckpointError: it holds no GPT-Neo language model that can be exported.
        DependencyError: torch is needed and not installed.
    """
    spec = read_config(folder)
    files = WeightFiles(folder)
    try:
        tensors = match_tensors(files.tensors, spec, folder)
    except BaseException:
        files.close()
        raise
    return Checkpoint(
        folder=folder,
        spec=spec,
        tensors=tensors,
        config_json=read_json_object(folder / CONFIG_NAME),
        generation_config=read_generation_config(folder),
        tokenizer_folder=folder,
        files=(files,),
    )


def read_generation_config(folder: Path) -> dict[str, Any] | None:
    """`generation_config.json`, unchanged; None if there is none.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    path = folder / GENERATION_CONFIG_NAME
    return read_json_object(path) if path.is_file() else None


def match_tensors(
    found: dict[str, LazyTensor], spec: ModelSpec, folder: Path
) -> dict[str, LazyTensor]:
    """The architecture's tensors, renamed and checked; harmless other tensors are dropped."""
    expected = expected_shapes(spec)
    named = _canonical(found)
    if spec.tie_word_embeddings and EMBEDDING not in named and HEAD in named:
        # safetensors.torch.save_model keeps the alphabetically first name of a shared tensor.
        named[EMBEDDING] = named.pop(HEAD)
    unexpected = named.keys() - expected.keys() - {HEAD}
    if unexpected:
        raise _unexpected_error(sorted(named[name].name for name in unexpected), spec, folder)
    if missing := [name for name in expected if name not in named]:
        raise _missing_error(missing, folder)
    for name, shape in expected.items():
        _check_tensor(name, named[name], shape, folder)
    if spec.tie_word_embeddings and HEAD in named:
        _check_tied_head(named[HEAD], named[EMBEDDING], expected[EMBEDDING], folder)
    return {
        name: LazyTensor(name, named[name].shape, named[name].dtype, named[name].load)
        for name in expected
    }


def _canonical(found: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors by the names of `GPTNeoForCausalLM`; `GPTNeoModel` omits `transformer.`."""
    named: dict[str, LazyTensor] = {}
    for name, tensor in found.items():
        if _OLD_BUFFER.fullmatch(name):
            continue
        plain = full_name(name)
        if plain in named:
            raise CheckpointError(
                f"the checkpoint has both {plain!r} and {plain.removeprefix('transformer.')!r}; "
                "expected every tensor once, with or without the prefix"
            )
        named[plain] = tensor
    return named


def _unexpected_error(names: list[str], spec: ModelSpec, folder: Path) -> CheckpointError:
    first = names[0]
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    for name in names:
        if any(mark in name for mark in _ADAPTER_MARKS):
            return CheckpointError(
                f"{folder}: tensor {name!r} belongs to a LoRA adapter; merge it into the model "
                "first with peft's merge_and_unload() and save that"
            )
        if any(mark in name for mark in _QUANTIZED_MARKS):
            return CheckpointError(
                f"{folder}: tensor {name!r} belongs to an already quantized checkpoint; export "
                "the original float32, float16 or bfloat16 checkpoint instead"
            )
        if name.startswith(_OTHER_HEADS):
            return CheckpointError(
                f"{folder}: tensor {name!r} is the head of a classification or "
                "question-answering checkpoint, expected a causal language model "
                "(GPTNeoForCausalLM); export the model it was tuned from"
            )
    for prefix in ("module.", "_orig_mod."):
        if first.startswith(prefix):
            return CheckpointError(
                f"{folder}: tensor {first!r}{more} was saved from a wrapped model; strip the "
                f"prefix {prefix!r} from the names, or call save_pretrained on the model inside"
            )
    return CheckpointError(
        f"{folder}: unexpected tensor {first!r}{more}; {CONFIG_NAME} describes a GPT-Neo of "
        f"{spec.num_layers} layers, which has none of that name. Is the {CONFIG_NAME} of "
        "another checkpoint?"
    )


def _missing_error(missing: list[str], folder: Path) -> CheckpointError:
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    advice = "is the download complete, and the config.json this checkpoint's own?"
    if missing == [HEAD]:
        advice = (
            "config.json says tie_word_embeddings false, which needs a head of its own; set it "
            "to true if the head is the embedding table"
        )
    return CheckpointError(f"{folder}: tensor {missing[0]!r} is missing{more}; {advice}")


def _check_tensor(name: str, tensor: LazyTensor, shape: tuple[int, ...], folder: Path) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{folder}: tensor {name!r} has type {tensor.dtype}, expected one of "
            f"{', '.join(FLOAT_DTYPES)}; convert it, or export the original checkpoint"
        )
    if tensor.shape == shape:
        return
    advice = "is the config.json this checkpoint's own?"
    if name in (EMBEDDING, HEAD) and tensor.shape[1:] == shape[1:]:
        advice = (
            f"the table has {tensor.shape[0]} rows and config.json says vocab_size {shape[0]}: if "
            "the vocabulary was resized, set vocab_size to the table's rows"
        )
    raise CheckpointError(
        f"{folder}: tensor {name!r} has shape {list(tensor.shape)}, expected {list(shape)}; "
        f"{advice}"
    )


def _check_tied_head(
    head: LazyTensor, embedding: LazyTensor, shape: tuple[int, ...], folder: Path
) -> None:
    """Check a head that a tied checkpoint stores as well: it must equal the embedding."""
    _check_tensor(HEAD, head, shape, folder)
    if not head.same_values(embedding):
        raise CheckpointError(
            f"{folder}: config.json sets tie_word_embeddings, but {HEAD!r} differs from "
            f"{EMBEDDING!r}; set tie_word_embeddings to false if the head is its own, or remove "
            f"{HEAD!r} if it is stale"
        )
