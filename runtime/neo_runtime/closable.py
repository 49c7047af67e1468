"""Context managers around `close`: always at the end of the block, or only on an error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

__all__ = ["Closable", "closed_on_error"]


class _Closes(Protocol):
    def close(self) -> None: ...


Resource = TypeVar("Resource", bound=_Closes)


@contextmanager
def closed_on_error(resource: Resource) -> Iterator[Resource]:
    """Close a resource if the block raises; otherwise whoever takes it over closes it."""
    try:
        yield resource
    except BaseException:
        resource.close()
        raise


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
