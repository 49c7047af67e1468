"""Backend cuda on a real GPU: neo-mini against PyTorch, every precision, and what capture does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from helpers import faults
from helpers.beginnings import assert_beginnings_hold
from helpers.cropping import assert_crops_hold
from helpers.forced import assert_forced_tokens_fit
from helpers.guessing import assert_guesses_change_nothing
from helpers.hf_reference import heldout_texts
from helpers.joining import assert_rows_join
from helpers.models import DEMO, ODD_CONFIGS, Reference, TinyConfig, make_checkpoint
from helpers.parity import assert_parity
from helpers.prefixes import assert_prefixes_hold
from helpers.running import relative_l2
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.passes.fuse_attention import HEAD_SIZE_MULTIPLE
from neo_export.tolerances import TOLERANCES
from neo_runtime.backends.cuda.backend import CudaBackend
from neo_runtime.backends.device.nvidia import CudaDevice, checked
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.bundle.manifest import Manifest
from neo_runtime.errors import NeoError
from neo_runtime.machine.gpu import cuda_runtime, require_cuda_provider
from neo_tools.diff.cli import main as diff_main

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from neo_runtime.machine.gpu import GpuFacts
    from neo_runtime.model import Model

pytestmark = pytest.mark.gpu
LIMIT = TOLERANCES["fp16"].logits
LIMITS = {"fp16": LIMIT, "bf16": TOLERANCES["bf16"].logits, "int8": 2 * LIMIT, "int4": 2 * LIMIT}
"""Of float16 and bfloat16 against PyTorch on the checkpoint. Of int8 and int4 against the CPU
provider on the same bundle, which `tests/export/test_cuda_target.py` holds to PyTorch: each is
within the limit of float16 of what the stored weights give."""


SUPPORTED = [name for name, c in ODD_CONFIGS.items() if c.head_dim % HEAD_SIZE_MULTIPLE == 0]
"""Other heads do not suit the fused attention: `why_not_cuda`."""


def require_cuda(gpu: GpuFacts) -> None:
    try:
        require_cuda_provider(gpu)
    except NeoError as error:
        pytest.skip(f"no CUDA provider: {error}")


PRECISIONS = ("fp16", "bf16", "int8", "int4")


@pytest.fixture(scope="module", params=[*PRECISIONS, *(f"{name} kernels" for name in PRECISIONS)])
def bundle(
    request: pytest.FixtureRequest, gpu: GpuFacts, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The demo model, with and without kernels of its own for decode steps."""
    require_cuda(gpu)
    precision, *kernels = request.param.split()
    folder = tmp_path_factory.mktemp("cuda") / precision
    export_bundle(str(DEMO), folder, ExportOptions(target="cuda", precision=precision))
    if kernels:
        add_kernels(folder)
    return folder


def add_kernels(folder: Path) -> None:
    """`neo-kernels` in a process that compiles: this one interprets."""
    pytest.importorskip("triton", reason="Triton is not installed: neo-onnx[kernels]")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "neo_export.kernels.cli", str(folder)]
    subprocess.run(command, check=True, env=environment)


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[Model]:
    with neo_runtime.load(bundle, backend="cuda") as model:
        yield model


@pytest.fixture(scope="module")
def text(reference: Reference, model: Model, bundle: Path) -> tuple[Any, Any]:
    """Token ids [1, 512], and the logits that each position should have."""
    ids = np.random.default_rng(6).integers(0, 4096, (1, 512), dtype=np.int64)
    if model.manifest.precision not in ("int8", "int4"):
        return ids, reference.logits(ids)
    with neo_runtime.load(bundle, backend="cpu") as cpu:
        return ids, cpu.logits(ids[0])[None]


def test_every_position(model: Model, text: tuple[Any, Any]) -> None:
    ids, expected = text
    error = relative_l2(model.logits(ids[0]), expected[0])
    assert error.max() <= LIMITS[model.manifest.precision]


def test_prefill_and_decode_across_the_window_to_the_end(
    model: Model, text: tuple[Any, Any]
) -> None:
    ids, expected = text
    limit = LIMITS[model.manifest.precision]
    for prompt in (1, 63, 64, 65, 300):
        with model.new_cache(1, 512) as cache:
            found = [model.prefill(cache, [ids[0, :prompt]])]
            found += [model.decode(cache, [ids[0, n]]) for n in range(prompt, prompt + 8)]
        error = relative_l2(np.concatenate(found), expected[0, prompt - 1 : prompt + 8])
        assert error.max() <= limit
    with model.new_cache(1, 512) as cache:
        found = [model.prefill(cache, [ids[0, :480]])]
        found += [model.decode(cache, [ids[0, n]]) for n in range(480, 512)]
    assert relative_l2(np.concatenate(found), expected[0, 479:]).max() <= limit


def test_ragged_batches_and_chunks(model: Model, text: tuple[Any, Any]) -> None:
    ids, expected = text
    limit = LIMITS[model.manifest.precision]
    counts = [7, 130, 64]
    with model.new_cache(3, 200) as cache:
        found = model.prefill(cache, [ids[0, :n] for n in counts])
        later = model.prefill(cache, [ids[0, n : n + 20] for n in counts])
        step = model.decode(cache, [ids[0, n + 20] for n in counts])
    for row, n in enumerate(counts):
        for logits, at in ((found, n - 1), (later, n + 19), (step, n + 20)):
            assert relative_l2(logits[row], expected[0, at]).max() <= limit


def test_rows_join_and_begin_with_another_cache(model: Model, bundle: Path) -> None:
    limit = LIMITS[model.manifest.precision]
    if model.manifest.precision not in ("int8", "int4"):
        assert_rows_join(model, limit)
        assert_prefixes_hold(model, limit)
        assert_beginnings_hold(model, limit)
        assert_crops_hold(model, limit)
        return
    with neo_runtime.load(bundle, backend="cpu") as cpu:
        assert_rows_join(model, limit, cpu.logits)
        assert_prefixes_hold(model, limit, cpu.logits)
        assert_beginnings_hold(model, limit, cpu.logits)
        assert_crops_hold(model, limit, cpu.logits)


def test_guesses_change_nothing(model: Model) -> None:
    assert_guesses_change_nothing(model, 0.05)


def test_forced_tokens_fit(model: Model) -> None:
    assert_forced_tokens_fit(model, 0.05)


def test_requests_that_share_steps(model: Model) -> None:
    """Of eight threads, in four rows: each ends where it ends alone, and near the same scores."""
    texts = [text[: 20 + 30 * index] for index, text in enumerate(heldout_texts()[:8])]
    alone = [model.generate(text, max_new_tokens=20, logprobs=0) for text in texts]
    with (
        neo_runtime.Scheduler(model, max_batch_size=4, max_length=256) as scheduler,
        ThreadPoolExecutor(8) as threads,
    ):
        found = threads.map(
            lambda text: scheduler.submit(text, max_new_tokens=20, logprobs=0).result(), texts
        )
        for completion, expected in zip(found, alone, strict=True):
            assert completion.prompt_token_ids == expected.prompt_token_ids
            first, other = (one.logprobs[0] for one in (completion, expected) if one.logprobs)
            assert first.logprob == pytest.approx(other.logprob, abs=0.05)


def test_a_replayed_step_is_the_step(model: Model, text: tuple[Any, Any]) -> None:
    """A second cache of the same size replays the first one's graph, over what is new."""
    ids, _ = text
    for start in (0, 100):
        with model.new_cache(1, 64) as cache:
            model.prefill(cache, [ids[0, start : start + 8]])
            first = model.decode(cache, [5]).copy()
            again = [model.decode(cache, [token]) for token in (7, 9)]
        with model.new_cache(1, 64) as cache:
            whole = model.prefill(cache, [np.append(ids[0, start : start + 8], [5, 7, 9])])
        assert np.isfinite(first).all()
        assert relative_l2(again[-1], whole).max() <= 2 * LIMIT


def test_candidates_give_the_text_of_full_logits(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options in ({}, {"do_sample": True, "seed": 3}, {"do_sample": True, "seed": 4, "top_k": 0}):
        found = model.generate(["Once upon a time", "The"], max_new_tokens=60, **options)
        with monkeypatch.context() as patch:
            patch.setattr("neo_runtime.backends.step_logits.RowLogits.candidates", None)
            full = model.generate(["Once upon a time", "The"], max_new_tokens=60, **options)
        assert [c.text for c in found] == [c.text for c in full]


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("name", SUPPORTED)
def test_checkpoints_that_stand_out(
    name: str, kernels: bool, gpu: GpuFacts, tmp_path: Path
) -> None:
    """Windows, heads, layers and vocabularies of all kinds, by every way that a service calls."""
    require_cuda(gpu)
    config = ODD_CONFIGS[name]
    source = make_checkpoint(tmp_path / "model", config)
    export_bundle(str(source), tmp_path / "b", ExportOptions(target="cuda", precision="fp16"))
    if kernels:
        add_kernels(tmp_path / "b")
    with neo_runtime.load(tmp_path / "b", backend="cuda") as model:
        assert_parity(model, Reference(source), config, LIMIT)


def _memory_of_sessions(bundle: Path) -> tuple[int, int]:
    """Bytes on the device that all three sessions take beside the weights, and those of these."""
    cuda = cuda_runtime()

    def free() -> int:
        return int(checked(cuda.cudaMemGetInfo(), "count memory")[0])

    with closing(CudaBackend(open_bundle(bundle), CudaDevice())) as backend:
        before = free()
        backend.prepare(("prefill", "decode", "score"))
        return before - free(), backend.weight_bytes


def test_the_weights_are_on_the_device_once(bundle: Path, tmp_path: Path) -> None:
    """onnxruntime uses a supplied weight only on the device that it planned; else it copies.

    Every session has workspaces of cuBLAS, which are as large for a small model.
    """
    precision = str(Manifest.from_json((bundle / "neo.json").read_text()).precision)
    config = TinyConfig(
        vocab_size=50257, num_heads=16, head_dim=128, attention_layers=("global", "local") * 2
    )
    large = tmp_path / "large"
    export_bundle(
        str(make_checkpoint(tmp_path / "model", config)),
        large,
        ExportOptions(target="cuda", precision=precision),
    )
    small_sessions, _ = _memory_of_sessions(bundle)
    sessions, weights = _memory_of_sessions(large)
    assert weights > 150e6
    assert sessions - small_sessions < weights // 4


def test_beams_and_threads(model: Model) -> None:
    found = model.generate("Once upon a time", max_new_tokens=20, num_beams=4)
    assert found.text


def test_neo_diff_on_the_gpu(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step of every layer as this GPU computes it; and a window off by one is named."""
    few = ["--tokens", "1024", "--decode-positions", "32", "--backend", "cuda", "--json", "--quiet"]
    assert diff_main([str(bundle), "--reference", str(DEMO), "--report-only", *few]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bundle"]["backend"] == "cuda"
    assert found["first_fault"] is None
    assert {place["graph"] for place in found["places"]} == {"score", "prefill", "decode"}
    fault = faults.window_for_global(1, 65)
    spoiled = faults.spoiled_bundle(bundle, tmp_path / "spoiled", fault)
    assert diff_main([str(spoiled), "--reference", str(DEMO), *few]) == 1
    first = json.loads(capsys.readouterr().out)["first_fault"]
    assert (first["layer"], first["place"]) == (1, "attended")
