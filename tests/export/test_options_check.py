"""Options that contradict the model or the target, by what a user would write in Python."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from helpers.int8_cache import calibrated
from helpers.models import TinyConfig, make_checkpoint, random_ids
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.decisions.options import ExportOptions
from neo_export.decisions.options_check import check_options
from neo_export.exporter import export_bundle
from neo_export.quantize.plan import Storage, WeightPlan
from neo_export.targets import TARGETS, Quantization
from neo_runtime import load
from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from neo_runtime.bundle.manifest import ModelSpec

PLAN = WeightPlan(Storage("int8"), (("transformer.wte.weight", Storage("int4", 128)),))
HALF = WeightPlan(Storage("int8"), (("transformer.wte.weight", Storage("fp16")),))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """Two heads of 20."""
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny"), TinyConfig(head_dim=20))
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.spec


def check(spec: ModelSpec, target: str, precision: str, **quantization: object) -> None:
    chosen = Quantization(**quantization)  # type: ignore[arg-type]
    options = ExportOptions(target=target, precision=precision, quantization=chosen)
    check_options(spec, TARGETS[target], options)


def test_int8_for_cuda_is_stored_in_blocks(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", TinyConfig(head_dim=8, num_heads=5))
    with open_checkpoint(folder) as checkpoint:
        check(checkpoint.spec, "cpu", "int8")
        with pytest.raises(RequestError, match="divides all of the widths 40; export with --fp16"):
            check(checkpoint.spec, "cuda", "int8")


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        (TinyConfig(head_dim=8), "multiples of 16 if .* local layers, this one's head size is 8"),
        (TinyConfig(head_dim=40), "head size is 40"),
        (TinyConfig(head_dim=48), None),
        (TinyConfig(head_dim=8, attention_layers=("global", "global")), None),
        (TinyConfig(head_dim=8, attention_layers=("local", "local")), None),
        (TinyConfig(head_dim=4), "reads int8.* multiple of 8; this model's head size is 4"),
    ],
)
def test_head_sizes_of_an_int8_cache(
    tmp_path: Path, config: TinyConfig, refused: str | None
) -> None:
    """What is taken runs; onnxruntime itself refuses the others, behind all the work."""
    source = make_checkpoint(tmp_path / "model", config)
    with open_checkpoint(source) as checkpoint:
        model = checkpoint.spec
    options = ExportOptions(kv_cache="int8")
    if refused is not None:
        with pytest.raises(RequestError, match=refused):
            check_options(model, TARGETS["cpu"], options)
        return
    check_options(model, TARGETS["cpu"], options)
    ids = random_ids(config, 1, config.max_position_embeddings)
    options = replace(options, calibration=calibrated(source, ids, tmp_path / "statistics"))
    export_bundle(str(source), tmp_path / "bundle", options)
    with load(tmp_path / "bundle") as exported:
        assert exported.generate(ids[0, :5], max_new_tokens=30)


def test_what_fits(spec: ModelSpec) -> None:
    check(spec, "cpu", "fp32")
    check(spec, "cpu", "int8", keep=("*.wte.weight",))
    check(spec, "portable", "fp16")
    check(spec, "tensorrt", "fp8")


def test_blocks_that_a_target_has_not(spec: ModelSpec) -> None:
    wide = replace(spec, hidden_size=256, head_dim=64, num_heads=4, intermediate_size=1024)
    check(wide, "cpu", "int4", block_size=256)
    plan = WeightPlan(Storage("int8"), (("*.c_fc.weight", Storage("int4", 256)),))
    for precision, given in (("int4", {"block_size": 256}), ("mixed", {"plan": plan})):
        with pytest.raises(RequestError, match="target cuda has no int4 in blocks of 256"):
            check(wide, "cuda", precision, **given)


@pytest.mark.parametrize(
    ("target", "precision", "quantization", "message"),
    [
        ("cuda", "fp16", {}, "head size is 20, but .* target cuda needs a multiple of 8"),
        ("cuda", "int8", {}, "head size is 20"),
        ("cpu", "int4", {}, "no block size divides all of the widths 40, 160; export with --int8"),
        ("cpu", "int4", {"block_size": 16}, "does not fit transformer.wte.weight.* 40 inputs"),
        ("cpu", "mixed", {"plan": PLAN}, "block size 128 does not fit transformer.wte.weight"),
        ("cpu", "mixed", {"plan": HALF}, "the plan mixes fp16, int8"),
        ("cpu", "mixed", {"plan": WeightPlan.uniform("fp16")}, "stores weights in fp16"),
    ],
)
def test_what_does_not(
    spec: ModelSpec, target: str, precision: str, quantization: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        check(spec, target, precision, **quantization)


def test_a_window_that_no_sequence_reaches_past(tmp_path: Path) -> None:
    """The operator takes no cache shorter than the window: without one it is as long as asked."""
    config = TinyConfig(window_size=12, attention_layers=("global", "local"))
    source = make_checkpoint(tmp_path / "model", config)
    ids = random_ids(config, 12)
    texts, sizes = [], []
    for length, window in ((None, 12), (13, 12), (12, None)):
        bundle = tmp_path / f"bundle-{length}"
        export_bundle(str(source), bundle, ExportOptions(max_length=length))
        with load(bundle) as model:
            assert model.manifest.cache.window == window
            sizes.append(model.cache_bytes(1, 4))
            [completion] = model.generate([ids[:5]], max_new_tokens=7)
            texts.append((completion.token_ids, model.logits(ids).tobytes()))
    assert texts[0] == texts[1] == texts[2]
    assert sizes[0] == sizes[1] > sizes[2]


def test_a_position_that_float16_cannot_hold(tmp_path: Path) -> None:
    from transformers import GPTNeoForCausalLM

    source = make_checkpoint(tmp_path / "model", TinyConfig())
    model = GPTNeoForCausalLM.from_pretrained(source)
    model.transformer.wpe.weight.data[3, 1] = 1e5
    model.save_pretrained(source)
    ids = random_ids(TinyConfig(), 12)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor(ids[None])).logits[0].numpy()
    bundle = tmp_path / "bundle"
    export_bundle(str(source), bundle, ExportOptions(precision="int8", verify=True))
    with load(bundle) as exported:
        found = exported.logits(ids)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
