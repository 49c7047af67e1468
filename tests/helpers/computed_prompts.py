"""Records how many prompt tokens each prefill call computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neo_runtime.cached_model import CachedModel

if TYPE_CHECKING:
    import pytest


def computed_prompts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that every call of `CachedModel.prefill_step` extends until the test ends."""
    tokens: list[int] = []
    prefill = CachedModel.prefill_step

    def prefill_step(model: CachedModel, cache: Any, prompts: Any, rows: Any = None) -> Any:
        tokens.append(sum(map(len, prompts)))
        return prefill(model, cache, prompts, rows)

    monkeypatch.setattr(CachedModel, "prefill_step", prefill_step)
    return tokens
