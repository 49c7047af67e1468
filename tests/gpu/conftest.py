"""Everything in this folder needs an NVIDIA GPU, and skips with the reason where there is none."""

from __future__ import annotations

import pytest
from neo_runtime.errors import NeoError
from neo_runtime.machine.gpu import GpuFacts, require_gpu


@pytest.fixture(scope="session")
def gpu() -> GpuFacts:
    try:
        return require_gpu()
    except NeoError as error:
        pytest.skip(f"no GPU: {error}")
