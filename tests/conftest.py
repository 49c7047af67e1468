"""Shared fixtures: bundles of the demo model, and the same model in PyTorch as the reference."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# Set before PyTorch and numpy read them. Several workers with one thread per core each would mostly
# wait for one another; and with one thread, sums have the same order on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Triton interprets kernels here. Tests that compile kernels do so in separate processes.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from helpers.models import DEMO, Reference
from helpers.older_kernels import older_environ, why_impossible

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Cache of prepacked weights for the session, so that no test writes to the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEO_CACHE_DIR", str(folder))
        yield folder


def _export(factory: pytest.TempPathFactory, target: str, precision: str = "fp32") -> Path:
    from neo_export.exporter import ExportOptions, export_bundle  # runtime tests do without

    bundle = factory.mktemp("demo") / target
    export_bundle(str(DEMO), bundle, ExportOptions(target=target, precision=precision))
    return bundle


@pytest.fixture(scope="session")
def mini_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model for target `cpu`, float32. Read-only: shared by the whole session."""
    return _export(tmp_path_factory, "cpu")


@pytest.fixture(scope="session")
def older_kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables that make onnxruntime use its AVX2 kernels."""
    reason = why_impossible()
    if reason is not None:
        pytest.skip(reason)
    return older_environ(tmp_path_factory.mktemp("older"))


@pytest.fixture(scope="session")
def portable_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model for target `portable`, float32. Read-only."""
    return _export(tmp_path_factory, "portable")


@pytest.fixture(scope="session")
def cuda_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model for target `cuda`, float16; tests run it on the CPU provider. Read-only."""
    return _export(tmp_path_factory, "cuda", "fp16")


@pytest.fixture(scope="session")
def tensorrt_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model for target `tensorrt`, float32. Read-only."""
    return _export(tmp_path_factory, "tensorrt")


@pytest.fixture(scope="session")
def reference() -> Reference:
    """The demo model in PyTorch, float32; `reference.model` is the `nn.Module`."""
    return Reference(DEMO)
