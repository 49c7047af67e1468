"""Fixtures that every folder of tests may use: the demo model, exported, and PyTorch's answers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# Before PyTorch and numpy read them: several workers with a thread for every core each spend most
# of their time waiting for one another. And sums come in one order, whatever the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Kernels are interpreted; those that are compiled are compiled in processes of their own.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from helpers.models import DEMO, Reference
from helpers.older_kernels import older_environ, why_impossible

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Prepacked weights of the whole session: no test writes into the user's own cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEO_CACHE_DIR", str(folder))
        yield folder


def _export(factory: pytest.TempPathFactory, target: str, precision: str = "fp32") -> Path:
    from neo_export.exporter import ExportOptions, export_bundle  # the runtime's tests do without

    bundle = factory.mktemp("demo") / target
    export_bundle(str(DEMO), bundle, ExportOptions(target=target, precision=precision))
    return bundle


@pytest.fixture(scope="session")
def mini_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model for the target `cpu`, float32. Read only: the whole session shares it."""
    return _export(tmp_path_factory, "cpu")


@pytest.fixture(scope="session")
def older_kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables with which onnxruntime takes its kernels for AVX2."""
    reason = why_impossible()
    if reason is not None:
        pytest.skip(reason)
    return older_environ(tmp_path_factory.mktemp("older"))


@pytest.fixture(scope="session")
def portable_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model for the target `portable`, float32. Read only."""
    return _export(tmp_path_factory, "portable")


@pytest.fixture(scope="session")
def cuda_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model for the target `cuda`, float16; it runs on the CPU provider. Read only."""
    return _export(tmp_path_factory, "cuda", "fp16")


@pytest.fixture(scope="session")
def tensorrt_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model for the target `tensorrt`, float32. Read only."""
    return _export(tmp_path_factory, "tensorrt")


@pytest.fixture(scope="session")
def reference() -> Reference:
    """The demo model in PyTorch, float32; `reference.model` is the module itself."""
    return Reference(DEMO)
