"""Opens a Hugging Face GPT-Neo checkpoint: a whole model, or a LoRA adapter of one.

    with open_model("EleutherAI/gpt-neo-1.3B") as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            use(name, tensor.read())

Tensors have the names of `GPTNeoForCausalLM`, whatever class wrote the file.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from neo_runtime.errors import CheckpointError, NeoError

from neo_export.checkpoint.adapter import ADAPTER_FILES, Adapter
from neo_export.checkpoint.adapter_config import ADAPTER_CONFIG_NAME
from neo_export.checkpoint.hub import resolve_model, resolve_tokenizer
from neo_export.checkpoint.tokenizer_files import has_tokenizer
from neo_export.checkpoint.weight_files import WEIGHT_FILES
from neo_export.checkpoint.whole import (
    Checkpoint,
    match_tensors,
    open_whole,
    read_generation_config,
)
from neo_export.gpt_neo.parameters import EMBEDDING, HEAD

__all__ = ["open_checkpoint", "open_model"]


def open_model(model: str, base: str | None = None, tokenizer: str | None = None) -> Checkpoint:
    """Open and check the model that the user named, as `open_checkpoint` does.

    Args:
        model: a folder, a hub id, or `modelscope:` and an id (`resolve_model`).
        base: the base model of an adapter, in the same forms; None for the one that the adapter
            names.
        tokenizer: whose tokenizer to use, in the same forms; None for the checkpoint's own.

    Raises:
        CheckpointError: it is not a GPT-Neo language model that can be exported, or `tokenizer`
            has no tokenizer.
        DependencyError: the hub's client library or torch is needed and not installed.
        HubError: it cannot be downloaded.
        OutputError: the disk is full.
    """
    folder = None if tokenizer is None else _tokenizer_folder(tokenizer)
    checkpoint = open_checkpoint(resolve_model(model), base)
    return checkpoint if folder is None else replace(checkpoint, tokenizer_folder=folder)


def _tokenizer_folder(model: str) -> Path:
    folder = resolve_tokenizer(model)
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"--tokenizer: {model} has no tokenizer; expected a folder or a hub id with "
            "tokenizer.json, or with vocab.json and merges.txt"
        )
    return folder


def open_checkpoint(folder: Path | str, base: str | None = None) -> Checkpoint:
    """Open and check a checkpoint folder; tensors are only read to compare tied tables.

    Args:
        folder: holds `config.json` and `model.safetensors` or `pytorch_model.bin`, one file or
            shards, with or without the `transformer.` prefix; or a LoRA adapter as peft writes it,
            whose base model is opened, too.
        base: the base model of an adapter (a folder or a hub id); None for the one that the
            adapter names.

    Raises:
        CheckpointError: the folder holds no GPT-Neo language model that can be exported.
        DependencyError: torch is needed and not installed.
        HubError: the base model of an adapter cannot be downloaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a Hugging Face model folder")
    is_whole = any((folder / name).is_file() for name in WEIGHT_FILES)
    has_config = (folder / ADAPTER_CONFIG_NAME).is_file()
    has_adapter = has_config and any((folder / name).is_file() for name in ADAPTER_FILES)
    if is_whole and has_adapter:
        raise CheckpointError(
            f"{folder} holds both a whole model and a LoRA adapter, expected one of them; "
            "move one of them to a folder of its own"
        )
    if has_config and not is_whole:
        return _open_adapter(folder, base)
    if base is not None:
        raise CheckpointError(
            f"the base model {base} was given, but {folder} is not a LoRA adapter (no "
            f"{ADAPTER_CONFIG_NAME}, or the weights of a whole model); omit --base"
        )
    return open_whole(folder)


def _open_adapter(folder: Path, base: str | None) -> Checkpoint:
    """The base model with the adapter merged into it."""
    with ExitStack() as opened:
        adapter = opened.enter_context(Adapter(folder, base))
        try:
            model = opened.enter_context(open_whole(resolve_model(adapter.config.base)))
        except NeoError as error:
            where = f"{ADAPTER_CONFIG_NAME} names it (base_model_name_or_path), --base another"
            raise type(error)(
                f"{folder} is a LoRA adapter of {adapter.config.base}, which cannot be used "
                f"({error})" + ("" if base else f"; {where}")
            ) from error
        checkpoint = _adapted(model, adapter)
        opened.pop_all()
    return checkpoint


def _adapted(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The base model with merged tensors, and with other files of the adapter's folder.

    A tied table stays tied only if the adapter changes embedding and head in the same way.
    """
    folder, spec = adapter.folder, base.spec
    tensors = dict(base.tensors)
    shared = {HEAD: tensors[EMBEDDING]} if spec.tie_word_embeddings else {}
    changed = adapter.merged(shared | tensors, is_tied=spec.tie_word_embeddings)
    tables = changed.keys() & {EMBEDDING, HEAD}
    is_tied = spec.tie_word_embeddings and (
        not tables or (len(tables) == 2 and changed[HEAD].same_values(changed[EMBEDDING]))
    )
    if spec.tie_word_embeddings and not is_tied:
        tensors[HEAD] = tensors[EMBEDDING]
    if is_tied:
        changed.pop(HEAD, None)
    rows = changed.get(EMBEDDING, tensors[EMBEDDING]).shape[0]
    adapted = replace(spec, tie_word_embeddings=is_tied, vocab_size=rows)
    facts = {"tie_word_embeddings": is_tied, "vocab_size": rows} if adapted != spec else {}
    return replace(
        base,
        folder=folder,
        spec=adapted,
        tensors=match_tensors(tensors | changed, adapted, folder),
        config_json=base.config_json | facts,
        generation_config=read_generation_config(folder) or base.generation_config,
        tokenizer_folder=folder if has_tokenizer(folder) else base.tokenizer_folder,
        files=(*base.files, adapter),
    )
