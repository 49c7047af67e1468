"""Versions of installed packages. Standard library only."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["versions_of"]


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Python's version as "python", then those of distributions; absent ones are left out."""
    found = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
