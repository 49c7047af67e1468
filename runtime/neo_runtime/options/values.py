"""Checks of the values of generation options, one for each kind of value.

A check takes the option's name and the given value. It returns the value to store (numbers and
sequences in a canonical type), or raises a `RequestError` that says what was found, what was
expected and, if the cause is usually the same, what to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "Check",
    "Processor",
    "callback",
    "choice",
    "count",
    "exponential_decay",
    "flag",
    "functions",
    "number",
    "option",
    "optional_token_ids",
    "seeds",
    "sequence_bias",
    "strings",
    "token_bias",
    "token_ids",
    "token_sequences",
    "why_no_text",
]

_LARGEST, _SMALLEST = 3.4028234663852886e38, 1.1754943508222875e-38
"""The largest and the smallest normal float32 number; scores are float32."""
_LARGEST_ID = 2**63 - 1

Check = Callable[[str, Any], Any]
Processor: TypeAlias = "Callable[[NDArray[np.int64], NDArray[np.float32]], NDArray[Any]]"
"""A caller's logits processor: (ids int64 [n], scores float32 [V]) → scores [V]."""
T = TypeVar("T")


def option(default: T, check: Check, *, needs: str | None = None) -> T:
    """A dataclass field with its default, its check, and the option that it depends on.

    Args:
        default: the default, which has no effect; a missing entry means the same.
        check: see the module docstring.
        needs: `"do_sample"` or `"num_beams"` if only sampling or beam search reads the option.
    """
    stored: T = field(default=default, metadata={"check": check, "needs": needs})
    return stored


def _refuse(name: str, found: object, expected: str, hint: str = "") -> RequestError:
    return RequestError(f"{name} is {found!r}, expected {expected}{'; ' + hint if hint else ''}")


def _integer(name: str, value: object, expected: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _refuse(name, value, expected)
    return int(value)


def _float32(value: object) -> float | None:
    """A number that float32 holds; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= _LARGEST else None


def count(minimum: int, *, optional: bool = False) -> Check:
    """An integer of at least `minimum`; with `optional` also None."""
    expected = f"an integer of at least {minimum}{' or None' if optional else ''}"

    def check(name: str, value: Any) -> int | None:
        if value is None and optional:
            return None
        found = _integer(name, value, expected)
        if found < minimum:
            raise _refuse(name, value, expected)
        return found

    return check


def number(
    *,
    above: float | None = None,
    below: float | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    optional: bool = False,
    hint: str = "",
) -> Check:
    """A finite number within the limits (`above` and `below` are exclusive)."""
    limits = [
        f"{word} {limit:g}"
        for word, limit in (
            ("above", above),
            ("at least", minimum),
            ("below", below),
            ("at most", maximum),
        )
        if limit is not None
    ]
    expected = " ".join(["a number that float32 holds,", " and ".join(limits)]).strip(" ,")
    expected += " or None" if optional else ""

    def check(name: str, value: Any) -> float | None:
        if value is None and optional:
            return None
        found = _float32(value)
        if found is None:
            raise _refuse(name, value, expected, hint)
        if (
            (above is not None and found - above < _SMALLEST)
            or (minimum is not None and found < minimum)
            or (below is not None and found >= below)
            or (maximum is not None and found > maximum)
        ):
            raise _refuse(name, value, expected, hint)
        return found

    return check


def flag(name: str, value: Any) -> bool:
    """True or False (numpy's as well), and nothing else."""
    is_flag = isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b"
    if not is_flag or getattr(value, "ndim", False):
        raise _refuse(name, value, "True or False")
    return bool(value)


def choice(*allowed: object) -> Check:
    """One of `allowed`, of the same type (1 is not True)."""

    def check(name: str, value: Any) -> Any:
        for candidate in allowed:
            if type(value) is type(candidate) and value == candidate:
                return candidate
        raise _refuse(name, value, "one of " + ", ".join(map(repr, allowed)))

    return check


def _items(name: str, value: Any, expected: str) -> list[Any]:
    """The items of a sequence or numpy array; strings are refused."""
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise _refuse(name, value, expected)
    return list(value)


def _not_negative(name: str, value: object, expected: str) -> int:
    found = _integer(name, value, expected)
    if found < 0:
        raise _refuse(name, found, expected)
    return found


def _token_id(name: str, value: object, expected: str) -> int:
    found = _not_negative(name, value, expected)
    if found > _LARGEST_ID:
        raise _refuse(name, found, expected, f"ids are 64-bit integers, at most {_LARGEST_ID}")
    return found


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """One token id or a sequence of them."""
    expected = "a token id (0 or more) or a sequence of them"
    if isinstance(value, Integral):
        value = (value,)
    return tuple(_token_id(name, item, expected) for item in _items(name, value, expected))


def optional_token_ids(name: str, value: Any) -> tuple[int, ...] | None:
    """As `token_ids`, or None."""
    return None if value is None else token_ids(name, value)


def _token_sequence(name: str, value: Any) -> tuple[int, ...]:
    expected = "a sequence of sequences of token ids, none of them empty"
    ids = tuple(_token_id(name, item, expected) for item in _items(name, value, expected))
    if not ids:
        raise _refuse(name, value, expected)
    return ids


def callback(name: str, value: object) -> None:
    """Refuse what cannot be called."""
    if not callable(value):
        raise RequestError(f"{name} is {value!r}, expected a function")


def token_sequences(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    """Sequences of token ids, none empty."""
    expected = "a sequence of sequences of token ids, none of them empty"
    return tuple(_token_sequence(name, item) for item in _items(name, value, expected))


def token_bias(name: str, value: Any) -> dict[int, float]:
    """`{token id: number to add to its logit}`; ids may be strings, as in JSON; -inf forbids."""
    expected = "a mapping of token ids to numbers"
    if not isinstance(value, Mapping):
        raise _refuse(name, value, expected)
    biases: dict[int, float] = {}
    for key, bias in value.items():
        is_digits = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20
        biases[_token_id(name, int(key) if is_digits else key, expected)] = _bias(name, bias)
    return biases


def sequence_bias(name: str, value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    """`{ids: bias}` or `[[ids, bias], …]`, the form that `generation_config.json` has."""
    expected = "a mapping of tuples of token ids to numbers, or a list of [ids, number]"
    pairs = list(value.items()) if isinstance(value, Mapping) else _items(name, value, expected)
    biases: dict[tuple[int, ...], float] = {}
    for pair in pairs:
        items = _items(name, pair, expected)
        if len(items) != 2:
            raise _refuse(name, pair, expected)
        biases[_token_sequence(name, items[0])] = _bias(name, items[1])
    return tuple(biases.items())


def _bias(name: str, value: Any) -> float:
    found = _float32(value)
    if found is None and isinstance(value, Real) and value < 0:
        return -math.inf  # so far below 0 that the token is forbidden
    if found is None:
        raise _refuse(f"a bias in {name}", value, "a number that float32 holds, or -inf")
    return found


def exponential_decay(name: str, value: Any) -> tuple[int, float] | None:
    """`(start, factor)`: new tokens before the penalty begins, and the base of its growth."""
    if value is None:
        return None
    expected = "None or (start: an integer of at least 0, factor: a number above 0)"
    items = _items(name, value, expected)
    if len(items) != 2:
        raise _refuse(name, value, expected)
    return count(0)(f"{name}[0]", items[0]), number(above=0)(f"{name}[1]", items[1])


def why_no_text(value: object) -> str | None:
    """Why a value is not text that UTF-8 can encode; None if it is."""
    if not isinstance(value, str):
        return f"it is of type {type(value).__name__}"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON cut in the middle of "\\ud83d\\ude00" has one.
        return f"character {error.start} is an unpaired surrogate, half of a character"
    return None


def strings(name: str, value: Any) -> tuple[str, ...]:
    """One string or a sequence of them, none empty."""
    expected = "a string or a sequence of strings, none of them empty"
    if isinstance(value, str):
        value = (value,)
    found = _items(name, value, expected)
    for item in found:
        if not isinstance(item, str) or not item:
            raise _refuse(name, item, expected)
        if (why := why_no_text(item)) is not None:
            raise _refuse(name, item, expected, why)
    return tuple(found)


def functions(name: str, value: Any) -> tuple[Any, ...]:
    """One function or a sequence of them."""
    expected = "a function (ids, scores) -> scores, or a sequence of such functions"
    if callable(value) and not isinstance(value, Sequence):
        value = (value,)
    found = _items(name, value, expected)
    for item in found:
        if not callable(item):
            raise _refuse(name, item, expected)
    return tuple(found)


def seeds(name: str, value: Any) -> int | tuple[int, ...] | None:
    """None, one integer of at least 0, or a sequence of them."""
    expected = "None, an integer of at least 0, or a sequence of such integers (one per prompt)"
    if value is None:
        return None
    if isinstance(value, Integral):
        return _not_negative(name, value, expected)
    items: Sequence[Any] = _items(name, value, expected)
    if not items:
        raise _refuse(name, value, expected)
    return tuple(_not_negative(name, item, expected) for item in items)
