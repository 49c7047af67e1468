"""A caller's logits processor, whose result is checked (option `logits_processor`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_runtime.options.values import Processor

__all__ = ["CustomProcessor"]


class CustomProcessor:
    """Wraps a caller's function. It may change any score, so each step fetches all logits."""

    def __init__(self, function: Processor) -> None:
        self._function = function

    def __call__(self, ids: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Apply the rule.

        Raises:
            RequestError: the function did not return one score per token, or a score is NaN or
                +inf.
        """
        history = ids.view()
        history.flags.writeable = False  # a view of the sequence itself
        try:
            given = self._function(history, scores)
        except StopIteration as error:  # it would silently end a loop of a caller
            raise RuntimeError(f"{self._name} raised StopIteration") from error
        try:
            found = np.asarray(given)
        except ValueError as error:
            raise RequestError(f"{self._name} gave no array of scores: {error}") from error
        if found.shape != scores.shape or found.dtype.kind not in "fiu":
            raise RequestError(
                f"{self._name} gave {found.dtype} of shape {list(found.shape)}, expected scores of "
                f"shape {list(scores.shape)}, those of one sequence; return the scores, changed in "
                "place or new"
            )
        with np.errstate(over="ignore"):
            result: NDArray[np.float32] = found.astype(np.float32, copy=False)
        top = result.max()
        if np.isnan(top) or top == np.inf:
            raise RequestError(
                f"{self._name} gave scores with {top} (in float32); give finite numbers, and -inf "
                "to forbid a token"
            )
        return result

    @property
    def _name(self) -> str:
        return f"the logits_processor {getattr(self._function, '__name__', self._function)}"
