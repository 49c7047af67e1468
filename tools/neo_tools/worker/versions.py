"""Versions of installed packages. Uses only the standard library."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["versions_of"]


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python (as "python") and of the distributions that are installed, by name."""
    found = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
