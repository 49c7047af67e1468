"""What bundles of one run must have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from helpers.models import TinyConfig, make_checkpoint
from neo_export.exporter import export_bundle
from neo_runtime.errors import DependencyError, DeviceError, RequestError
from neo_tools.bench.cases import PeerChoice, Settings, make_cases
from neo_tools.bench.opening import open_bundles

if TYPE_CHECKING:
    from pathlib import Path

CASES = make_cases(prompts=(4,), new_tokens=(2,), depths=(4,), batches=(1,), threads=(1,))


def test_models_of_one_vocabulary_are_told_apart(mini_bundle: Path, tmp_path: Path) -> None:
    config = TinyConfig(vocab_size=4096)
    export_bundle(str(make_checkpoint(tmp_path / "model", config)), tmp_path / "small")
    with pytest.raises(RequestError, match=r"different models.*4 layers, width 192.*2 layers"):
        open_bundles(Settings(bundles=(mini_bundle, tmp_path / "small"), cases=CASES))


def test_the_backend_is_named_before_anything_runs(
    mini_bundle: Path, cuda_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Settings(bundles=(mini_bundle, cuda_bundle), cases=CASES)
    half = Settings(bundles=(cuda_bundle,), cases=CASES)
    peer = Settings(
        bundles=(cuda_bundle,), peers=(PeerChoice(name="torch", precision="fp32"),), cases=CASES
    )

    def absent(device: int) -> None:
        raise DeviceError("no GPU")

    def no_provider(gpu: object) -> None:
        raise DependencyError("the wheel for CPUs")

    monkeypatch.setattr("neo_runtime.machine.gpu.require_cuda_provider", no_provider)
    monkeypatch.setattr("neo_runtime.machine.gpu.require_gpu", absent)
    for settings in (both, half, peer):
        assert open_bundles(settings)[0].backend == "cpu"
    monkeypatch.setattr("neo_runtime.machine.gpu.require_gpu", lambda device: None)
    assert open_bundles(half)[0].backend == "cpu", "onnxruntime's wheel here has no CUDA"
    monkeypatch.setattr("neo_runtime.machine.gpu.require_cuda_provider", lambda gpu: None)
    found, _ = open_bundles(half)
    assert found.backend == "cuda"
    assert found.on_gpu
    with pytest.raises(RequestError, match=r"on different machines \(.* on cpu, .* on cuda\)"):
        open_bundles(both)
    with pytest.raises(RequestError, match=r"peers on the CPU; name --backend cuda"):
        open_bundles(peer)
