"""The tokenizer's files of a checkpoint, and a `tokenizer.json` where there is only a GPT-2 pair.

Old checkpoints carry `vocab.json` and `merges.txt`. The tokenizer built from them is
transformers' `GPT2Tokenizer`: byte-level BPE, no normalizer, special tokens matched whole.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from neo_runtime.errors import CheckpointError

from neo_export.config import read_json_object

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import AddedToken, Tokenizer

__all__ = ["TOKENIZER_FILES", "find_tokenizer_files", "read_tokenizer_json"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
"""Every file that a tokenizer of GPT-Neo can have."""

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_DEFAULT_SPECIAL = "<|endoftext|>"
_LOG = logging.getLogger("neo_export")


def find_tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Those of `TOKENIZER_FILES` that are in `folder`."""
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def read_tokenizer_json(folder: Path) -> bytes | None:
    """Bytes of a `tokenizer.json`: the file's own, or built; None where nothing is there.

    Raises:
        CheckpointError: a file is not what it should be, or one of the pair is missing.
    """
    whole = folder / "tokenizer.json"
    if whole.is_file():
        return _completed(whole)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not vocab.is_file() and not merges.is_file():
        return None
    if not (vocab.is_file() and merges.is_file()):
        there, lacking = (vocab, merges) if vocab.is_file() else (merges, vocab)
        raise CheckpointError(
            f"{folder} has {there.name} and no {lacking.name}; expected both, or a tokenizer.json"
        )
    text = _build(folder, vocab, merges).to_str(pretty=False)
    return text.encode("utf-8")


def _completed(path: Path) -> bytes:
    """The file's own bytes, unless the files beside it name tokens that it lacks.

    A tokenizer that was enlarged and saved in the old form leaves the base model's file as it was.
    """
    from tokenizers import Tokenizer

    try:
        data = path.read_bytes()
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            f"{path} cannot be used as a tokenizer ({error}); download or save it again"
        ) from error
    folder = path.parent
    config = _optional(folder / "tokenizer_config.json")
    config |= _optional(folder / "special_tokens_map.json")
    special = _special_texts(config, tokenizer)
    added = _optional(folder / "added_tokens.json")
    try:
        numbered = _numbered_tokens(config, added, special, folder)
        lacking = {i: t for i, t in numbered.items() if tokenizer.token_to_id(t.content) is None}
        if not lacking:
            return data
        _add_numbered(tokenizer, lacking, folder)
    except CheckpointError as error:  # left over from another time: the whole file counts
        _LOG.warning("%s. Only what %s holds is used", error, path.name)
        return data
    text: str = tokenizer.to_str(pretty=False)
    return text.encode("utf-8")


def _build(folder: Path, vocab: Path, merges: Path) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    read_json_object(vocab)  # our own message if it is not a JSON object
    try:
        table, pairs = models.BPE.read_file(str(vocab), str(merges))
        model = models.BPE(
            table, pairs, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False
        )
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            f"{vocab} and {merges.name} cannot be used as a GPT-2 tokenizer ({error}); download "
            "or save them again"
        ) from error
    config = _optional(folder / "tokenizer_config.json")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=config.get("add_prefix_space") is True
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    config |= _optional(folder / "special_tokens_map.json")
    _add_tokens(tokenizer, config, _optional(folder / "added_tokens.json"), folder)
    _add_bos(tokenizer, config)
    return tokenizer


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    """The text of a token given as a string or as a serialized `AddedToken`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _special_texts(config: dict[str, Any], tokenizer: Tokenizer) -> list[str]:
    """Texts of the special tokens, in order, each once."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    texts = [_content(config.get(name)) for name in _NAMED]
    texts += [_content(token) for token in extra] if isinstance(extra, list) else []
    # GPT2Tokenizer's default of bos, eos and unk, unless this vocabulary lacks it.
    if tokenizer.token_to_id(_DEFAULT_SPECIAL) is not None:
        texts.append(_DEFAULT_SPECIAL)
    return list(dict.fromkeys(text for text in texts if text is not None))


def _add_tokens(
    tokenizer: Tokenizer, config: dict[str, Any], added: dict[str, Any], folder: Path
) -> None:
    """Add the special tokens, and those beyond the vocabulary with the ids they were given."""
    special = _special_texts(config, tokenizer)
    numbered = _numbered_tokens(config, added, special, folder)
    _add_numbered(tokenizer, numbered, folder)
    known_texts = {token.content for token in numbered.values()}
    tokenizer.add_special_tokens([text for text in special if text not in known_texts])


def _numbered_tokens(
    config: dict[str, Any], added: dict[str, Any], special: list[str], folder: Path
) -> dict[int, AddedToken]:
    """The tokens that `added_tokens_decoder` or `added_tokens.json` gives ids."""
    from tokenizers import AddedToken

    decoder = config.get("added_tokens_decoder")
    numbered: dict[int, AddedToken] = {}
    try:
        if isinstance(decoder, dict):
            numbered = {int(i): _added_token(token) for i, token in decoder.items()}
        else:
            for text, i in added.items():
                known = text in special
                numbered[int(i)] = AddedToken(text, special=known, normalized=not known)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: the added tokens are damaged ({error})") from error
    return numbered


def _add_numbered(tokenizer: Tokenizer, numbered: dict[int, AddedToken], folder: Path) -> None:
    for i, token in sorted(numbered.items()):
        tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != i:
            raise CheckpointError(
                f"{folder}: added token {token.content!r} should have id {i} and would get "
                f"{tokenizer.token_to_id(token.content)}; the tokenizer's files do not belong "
                "together. Save the tokenizer again with save_pretrained"
            )


def _added_token(raw: Any) -> AddedToken:
    from tokenizers import AddedToken

    if not isinstance(raw, dict) or _content(raw) is None:
        raise TypeError(f"{raw!r} is not a token")
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(raw["content"], **{key: raw[key] for key in flags if key in raw})


def _add_bos(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """`add_bos_token`: put the bos token before each text."""
    from tokenizers import processors

    bos = _content(config.get("bos_token", _DEFAULT_SPECIAL))
    token_id = None if bos is None else tokenizer.token_to_id(bos)
    if config.get("add_bos_token") is True and bos is not None and token_id is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, token_id)]
        )
