"""Check a caller's prompts, and convert them to token ids."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from neo_runtime.options.generation_options import GenerationOptions
    from neo_runtime.text.tokenizer import Tokenizer

__all__ = [
    "Prompt",
    "as_list",
    "has_parts",
    "named_prompt",
    "of_each",
    "prompt_ids",
    "token_array",
    "with_bad_words",
]

Prompt: TypeAlias = "str | Sequence[int] | NDArray[np.int64]"
"""Text, or token ids."""
T = TypeVar("T")


def as_list(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """One or several prompts as a list, and whether it was a single one (text or token ids).

    Raises:
        RequestError: `prompt` is not text, token ids, or a list of these.
    """
    given: Any = prompt
    if isinstance(given, str):
        return [given], True
    if not has_parts(given) or isinstance(given, bytes | dict | set | frozenset):
        raise RequestError(
            f"the prompt is of type {type(given).__name__}, expected text, token ids, or a list "
            "of these"
        )
    is_single = len(given) > 0 and _is_number(given[0])
    return ([given], True) if is_single else (list(given), False)


def _is_number(item: Any) -> bool:
    return not (isinstance(item, str) or has_parts(item))


def has_parts(item: Any) -> bool:
    """Whether a value has a length: unlike numbers and zero-dimensional arrays."""
    return hasattr(item, "__len__") and getattr(item, "ndim", 1) > 0


@contextmanager
def named_prompt(index: int, count: int) -> Iterator[None]:
    """A context manager that prefixes errors with the prompt's index, if there are several."""
    try:
        yield
    except RequestError as error:
        if count == 1:
            raise
        raise type(error)(f"prompts[{index}]: {error}") from error


def of_each(prompts: Sequence[Any], work: Callable[[Any], T]) -> list[T]:
    """The results of `work` for each prompt; errors name the prompt, see `named_prompt`."""
    found = []
    for index, prompt in enumerate(prompts):
        with named_prompt(index, len(prompts)):
            found.append(work(prompt))
    return found


def prompt_ids(prompt: Prompt, vocab_size: int, tokenizer: Tokenizer | None) -> NDArray[np.int64]:
    """The token ids of a prompt: int64 [n], n at least 1.

    Raises:
        RequestError: `prompt` is text, but there is no tokenizer; or see `token_array`.
    """
    if not isinstance(prompt, str):
        return token_array(prompt, vocab_size)
    if tokenizer is None:
        raise RequestError("the bundle has no tokenizer; give the prompt as token ids")
    return token_array(tokenizer.encode(prompt), vocab_size)


def token_array(ids: Sequence[int] | NDArray[Any], vocab_size: int) -> NDArray[np.int64]:
    """Check token ids, and convert them to an array: int64 [n], n at least 1.

    Raises:
        RequestError: there are no tokens, they are not a flat sequence of integers, or an id is
            outside of the vocabulary.
    """
    given: Any = ids
    if isinstance(given, str):
        raise RequestError(f"{given!r} is text, expected token ids; see Model.tokenizer.encode")
    try:
        found = np.asarray(given)
    except ValueError as error:  # sequences of unequal lengths
        raise RequestError("token ids are nested, expected a flat sequence of integers") from error
    if not found.size:
        raise RequestError("the prompt is empty; give at least one token")
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise RequestError(
            f"token ids have type {found.dtype} and shape {list(found.shape)}, expected a flat "
            "sequence of integers"
        )
    if found.min() < 0 or found.max() >= vocab_size:
        place = int(np.flatnonzero((found < 0) | (found >= vocab_size))[0])
        raise RequestError(
            f"token id {found[place]} at index {place} is out of range, expected 0 to "
            f"{vocab_size - 1}: the model has {vocab_size} tokens"
        )
    return found.astype(np.int64, copy=False)


def with_bad_words(
    options: GenerationOptions, words: Sequence[str], tokenizer: Tokenizer | None
) -> GenerationOptions:
    """Add words to `bad_words_ids`, each with and without a space before it.

    Args:
        options: the options to extend.
        words: one word, several, or None.
        tokenizer: the bundle's tokenizer; None if it has none.

    Raises:
        RequestError: there is no tokenizer, or `words` contains an empty word or a non-string.
    """
    found = _words(words)
    if not found:
        return options
    if tokenizer is None:
        raise RequestError("the bundle has no tokenizer; give bad_words_ids instead of bad_words")
    if not all(word.strip() for word in found):
        raise RequestError("bad_words contains an empty word; remove it")
    forms = [form for word in found for form in (word.strip(), " " + word.strip())]
    ids = [tokenizer.encode(form, add_special_tokens=False) for form in forms]
    return options.merged(bad_words_ids=(*options.bad_words_ids, *map(tuple, ids)))


def _words(given: Any) -> list[str]:
    """Check a value of `bad_words` (None, a string or an iterable of strings); return a list."""
    if given is None:
        return []
    if isinstance(given, str):
        return [given]
    words = None
    if hasattr(given, "__iter__") and not isinstance(given, bytes | dict):
        words = list(given)
    if words is None or not all(isinstance(word, str) for word in words):
        raise RequestError(
            f"bad_words is {given!r}, expected strings; use bad_words_ids for token ids"
        )
    return words
