"""Objects with `close` as context managers, and one that is closed only on an error."""

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
    """Give a resource to whoever will close it; here it is closed only where that fails."""
    try:
        yield resource
    except BaseException:
        resource.close()
        raise


class Closable(ABC):
    """Closed at the end of a `with` block, with or without an error."""

    @abstractmethod
    def close(self) -> None:
        """Free what the object holds; further calls do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
