"""A checkpoint's tokenizer files; builds a `tokenizer.json` from GPT-2's two files if needed.

Old checkpoints have `vocab.json` and `merges.txt`. The tokenizer built from them is
transformers' `GPT2Tokenizer`: byte-level BPE, no normalizer, special tokens matched whole.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from neo_runtime.errors import CheckpointError

from neo_export.checkpoint.config import read_json_object

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import AddedToken, Tokenizer

__all__ = [
    "TOKENIZER_FILES",
    "find_tokenizer_files",
    "has_tokenizer",
    "read_tokenizer_json",
    "warn_of_strangers",
]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
"""Every file that a tokenizer of GPT-Neo can have."""

# In the order in which transformers assigns ids to those without one.
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_DEFAULT_SPECIAL = "<|endoftext|>"
# Classes that use a `tokenizer.json` unchanged; GPT-2's class builds its own pre-tokenizer.
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_LOG = logging.getLogger("neo_export")


def find_tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Those of `TOKENIZER_FILES` that are in `folder`."""
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds `tokenizer.json`, or both files that one can be built from."""
    names = {path.name for path in find_tokenizer_files(folder)}
    return "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names


def read_tokenizer_json(folder: Path) -> bytes | None:
    """Bytes of a `tokenizer.json`: the existing file's or built; None without tokenizer files.

    Raises:
        CheckpointError: a file is invalid, or only one of `vocab.json` and `merges.txt` exists.
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
    """The file's own bytes, with additions from the other tokenizer files, as in transformers.

    Saving an enlarged tokenizer in the old format leaves the base model's `tokenizer.json`
    unchanged; setting `add_prefix_space` may do so, too.
    """
    from tokenizers import Tokenizer

    try:
        data = path.read_bytes()
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            f"{path} cannot be used as a tokenizer ({error}); download or save it again"
        ) from error
    changed = _set_prefix_space(tokenizer, _optional(path.parent / "tokenizer_config.json"), path)
    changed |= _add_lacking(tokenizer, path)
    if not changed:
        return data
    text: str = tokenizer.to_str(pretty=False)
    return text.encode("utf-8")


def _set_prefix_space(tokenizer: Tokenizer, config: dict[str, Any], path: Path) -> bool:
    """Set `add_prefix_space` as in `tokenizer_config.json`; returns whether that changes anything.

    GPT-2's class, the default for GPT-Neo, adds no space before the first word by default.
    """
    from tokenizers import pre_tokenizers

    asked = config.get("add_prefix_space") is True
    if config.get("tokenizer_class") in _GENERIC_CLASSES:
        return False
    step = tokenizer.pre_tokenizer
    if not isinstance(step, pre_tokenizers.ByteLevel):
        if asked:
            _LOG.warning(
                "%s: tokenizer_config.json has add_prefix_space, and the file splits text in a "
                "way of its own; its own way is kept",
                path,
            )
        return False
    if step.add_prefix_space == asked:
        return False
    step.add_prefix_space = asked
    return True


def _add_lacking(tokenizer: Tokenizer, path: Path) -> bool:
    """Add tokens that only the other tokenizer files have; returns whether there were any."""
    folder = path.parent
    config = _settings(folder)
    added = _optional(folder / "added_tokens.json")
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    try:
        special = _special_tokens(config, tokenizer, folder)
        numbered = _numbered_tokens(config, added, list(special), folder)
        lacking = {
            i: token
            for i, token in numbered.items()
            if token.content not in known and tokenizer.token_to_id(token.content) in (None, i)
        }
        _add_numbered(tokenizer, lacking, folder)
    except CheckpointError as error:  # the other files are stale: only tokenizer.json counts
        _LOG.warning("%s. Only what %s holds is used", error, path.name)
        return False
    known |= {token.content for token in lacking.values()}
    unnumbered = [token for text, token in special.items() if text not in known]
    tokenizer.add_special_tokens(unnumbered)
    return bool(lacking or unnumbered)


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
    config = _settings(folder)
    _add_tokens(tokenizer, config, _optional(folder / "added_tokens.json"), folder)
    _add_bos(tokenizer, config)
    return tokenizer


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, with `special_tokens_map.json` where transformers still reads it."""
    config = _optional(folder / "tokenizer_config.json")
    older = _optional(folder / "special_tokens_map.json")
    return config if "added_tokens_decoder" in config else config | older


def _content(token: Any) -> str | None:
    """The text of a token given as a string or as a serialized `AddedToken`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _special_tokens(
    config: dict[str, Any], tokenizer: Tokenizer, folder: Path
) -> dict[str, AddedToken]:
    """The special tokens by their texts, in order."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    named = [config.get(name) for name in _NAMED] + (extra if isinstance(extra, list) else [])
    # GPT2Tokenizer's default for bos, eos and unk, unless this vocabulary lacks it.
    is_generic = config.get("tokenizer_class") in _GENERIC_CLASSES
    if tokenizer.token_to_id(_DEFAULT_SPECIAL) is not None and not is_generic:
        named.append(_DEFAULT_SPECIAL)
    found: dict[str, AddedToken] = {}
    for token in named:
        if (text := _content(token)) is None or text in found:
            continue
        given = token if isinstance(token, dict) else {"content": text}
        try:
            found[text] = _added_token(given | {"special": True})
        except TypeError as error:
            raise CheckpointError(f"{folder}: token {text!r} is damaged ({error})") from error
    return found


def warn_of_strangers(data: bytes, vocab_size: int, folder: Path) -> None:
    """Warn of tokens in a `tokenizer.json` that are outside the model's vocabulary.

    The runtime refuses a prompt with such a token; transformers fails in the embedding.
    """
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_str(data.decode("utf-8")).get_vocab()
    strangers = sorted((i, text) for text, i in vocabulary.items() if i >= vocab_size)
    if not strangers:
        return
    shown = ", ".join(f"{text!r} ({i})" for i, text in strangers[:5])
    more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
    _LOG.warning(
        "%s: the tokenizer has tokens that the model of %d tokens has no row for: %s%s; a prompt "
        "that holds one will be refused",
        folder,
        vocab_size,
        shown,
        more,
    )


def _add_tokens(
    tokenizer: Tokenizer, config: dict[str, Any], added: dict[str, Any], folder: Path
) -> None:
    """Add the special tokens, and the tokens beyond the vocabulary with their ids."""
    special = _special_tokens(config, tokenizer, folder)
    numbered = _numbered_tokens(config, added, list(special), folder)
    _add_numbered(tokenizer, numbered, folder)
    known_texts = {token.content for token in numbered.values()}
    tokenizer.add_special_tokens([t for text, t in special.items() if text not in known_texts])


def _numbered_tokens(
    config: dict[str, Any], added: dict[str, Any], special: list[str], folder: Path
) -> dict[int, AddedToken]:
    """The tokens with ids in `added_tokens_decoder` or `added_tokens.json`."""
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
