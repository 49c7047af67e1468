"""A server of the demo model, shared by the tests of a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import neo_runtime
import pytest

pytest.importorskip("starlette", reason="starlette is not installed: pip install '.[serve]'")
pytest.importorskip("openai", reason="openai is not installed: pip install '.[test]'")

from helpers.serving import Served, served

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from neo_runtime.model import Model


@pytest.fixture(scope="module")
def model(mini_bundle: Path) -> Iterator[Model]:
    with neo_runtime.load(mini_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Served]:
    with served(model, max_batch_size=6) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[Any]:
    with server.client() as made:
        yield made
