"""What `close` means: context managers that call it, and the error afterwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from neo_runtime.errors import NeoError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

__all__ = ["Closable", "closed_on_error", "of_open_cache"]


class _Closes(Protocol):
    def close(self) -> None: ...


Resource = TypeVar("Resource", bound=_Closes)
Part = TypeVar("Part")


@contextmanager
def closed_on_error(resource: Resource) -> Iterator[Resource]:
    """Close a resource if the block raises; otherwise whoever takes it over closes it."""
    try:
        yield resource
    except BaseException:
        resource.close()
        raise


def of_open_cache(part: Part | None) -> Part:
    """A part of a cache, given as None once the cache is closed.

    Raises:
        NeoError: the cache is closed.
    """
    if part is None:
        raise NeoError("the cache is closed; make another one with Model.new_cache")
    return part


class Closable(ABC):
    """Base class of objects that are closed at the end of a `with` block, error or not."""

    @abstractmethod
    def close(self) -> None:
        """Free the resources of the object; further calls do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
