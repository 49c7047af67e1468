"""Graphs in NVIDIA's own parser, and plans by its ahead-of-time builder: without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from helpers.nvidia import flavour, needs_tensorrt_rtx, write_hollow_graphs
from neo_export.command.cli import main as export_main
from neo_export.engine import build as build_module
from neo_export.engine.build import build_engine, read_bundle
from neo_export.engine.cli import main
from neo_export.engine.device import Device, local_device
from neo_export.engine.flavour import Flavour
from neo_export.engine.network import add_profiles, parse_graph, profile_shapes
from neo_export.engine.progress import kept_interrupt, progress_monitor
from neo_export.engine.ranges import EngineRequest, resolve_options
from neo_export.exporter import ExportOptions, export_bundle
from neo_runtime.bundle.engine_record import (
    DECODE_PROFILE,
    ENGINES_FOLDER,
    PREFILL_PROFILE,
    EngineOptions,
    MachineFacts,
    read_records,
    why_unfit,
)
from neo_runtime.bundle.manifest import Manifest, ModelSpec
from neo_runtime.errors import BundleDamagedError, BundleError, EngineError, RequestError
from onnx import TensorProto, helper

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = needs_tensorrt_rtx

LARGE = ModelSpec(
    vocab_size=50257,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=24,
    num_heads=16,
    head_dim=128,
    max_position_embeddings=2048,
    window_size=256,
    attention_layers=("global", "local") * 12,
    layer_norm_epsilon=1e-5,
    activation_function="gelu_new",
    tie_word_embeddings=True,
    bos_token_id=50256,
    eos_token_id=(50256,),
    pad_token_id=None,
)
"""The published 1.3B shape."""
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "fp8")
ADA = Device("8.9", None)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from helpers.models import DEMO

    folder = tmp_path_factory.mktemp("tensorrt")
    for precision in PRECISIONS:
        options = ExportOptions(target="tensorrt", precision=precision)
        export_bundle(str(DEMO), folder / precision, options)
    return {precision: folder / precision for precision in PRECISIONS}


@pytest.fixture
def bundle(bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that may be written into."""
    return shutil.copytree(bundles["fp16"], tmp_path / "bundle")


def parse(graph: Path) -> Any:
    return parse_graph(flavour(), flavour().module.Builder(flavour().logger), graph)


@pytest.mark.parametrize("graph", ["prefill", "decode"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_demo_model_parses(bundles: dict[str, Path], precision: str, graph: str) -> None:
    network = parse(bundles[precision] / f"{graph}.onnx").network
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    expected = {"input_ids", "position_ids"} | {
        f"past_key_values.{layer}.{part}" for layer in range(4) for part in ("key", "value")
    }
    assert set(inputs) == expected | ({"logit_positions"} if graph == "prefill" else set())
    trt = flavour().module
    cache = {"fp32": trt.float32, "bf16": trt.bfloat16}.get(precision, trt.float16)
    assert inputs["past_key_values.0.key"].dtype == cache
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    assert kinds.count(trt.LayerType.ATTENTION_INPUT) == 4
    assert kinds.count(trt.LayerType.KV_CACHE_UPDATE) == 8


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_the_published_shape_parses(precision: str, tmp_path: Path) -> None:
    """1.3 billion parameters, as a sparse file of zeros; 8 bits with quantized inputs too."""
    for name, path in write_hollow_graphs(LARGE, precision, tmp_path, lambda _: 6.0).items():
        assert path.stat().st_size < 2e6
        network = parse(path).network
        assert network.num_outputs == 1 + 2 * LARGE.num_layers, name
        past = network.get_input(network.num_inputs - 1)
        assert tuple(past.shape) == (-1, 16, 2048, 128)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_demo_model_builds_with_both_profiles(
    bundles: dict[str, Path], precision: str, tmp_path: Path
) -> None:
    bundle = shutil.copytree(bundles[precision], tmp_path / "bundle")
    request = EngineRequest(max_batch=4, opt_length=64)
    stages: list[str] = []
    built = build_engine(bundle, request, flavour(), ADA, lambda stage, *_: stages.append(stage))
    record, plan = built.record, built.path.read_bytes()
    assert read_records(bundle) == [record]
    assert (len(plan), record.options.max_length) == (record.size, 512)
    assert any("Building engine" in stage for stage in stages), "TensorRT's own monitor"
    # What is in the bundle's digest is as it was, so the plan fits the bundle.
    here = MachineFacts(
        flavour="tensorrt_rtx",
        version=record.version,
        compute_capability="8.9",
        gpu="NVIDIA L4",
        platform=record.platform,
    )
    assert why_unfit(record, here, read_bundle(bundle).digest) is None
    assert why_unfit(record, replace(here, compute_capability="12.0"), record.bundle_digest)


def test_a_plan_ahead_of_time_is_named_by_its_capability_alone(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    """One that is built beside a GPU of that capability takes the place of one built elsewhere."""
    bundle = shutil.copytree(bundles["fp16"], tmp_path / "bundle")
    for device in (ADA, replace(ADA, name="NVIDIA L4")):
        build_engine(bundle, EngineRequest(max_length=8), flavour(), device)
    assert len(read_records(bundle)) == 1


def test_no_memory_is_allocated_while_a_step_runs() -> None:
    trt = flavour().module
    builder = trt.Builder(flavour().logger)
    options = EngineOptions(opt_length=16, max_length=48, max_logit_positions=20)
    config = build_module._configure(flavour(), builder, ADA, options)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def test_profiles_in_the_configuration_of_the_builder(bundles: dict[str, Path]) -> None:
    trt = flavour().module
    builder = trt.Builder(flavour().logger)
    parsed = parse_graph(flavour(), builder, bundles["fp16"] / "prefill.onnx")
    config = builder.create_builder_config()
    options = resolve_options(
        EngineRequest(max_batch=4, opt_batch=2, max_length=300, opt_length=100),
        read_bundle(bundles["fp16"]),
    )
    profiles = []

    class Recorder:
        """The builder, with its profiles kept to be looked at."""

        def create_optimization_profile(self) -> Any:
            profiles.append(builder.create_optimization_profile())
            return profiles[-1]

    add_profiles(Recorder(), config, parsed.network, options)
    assert config.num_optimization_profiles == 2
    decode, prefill = ([tuple(s) for s in p.get_shape("input_ids")] for p in profiles)
    assert decode == [(1, 1), (2, 1), (4, 2)]
    assert prefill == [(1, 1), (2, 100), (4, 300)]
    decode, prefill = ([tuple(s) for s in p.get_shape("logit_positions")] for p in profiles)
    assert (decode[-1], prefill[-1]) == ((4, 1), (4, 256))
    cache = [tuple(shape) for shape in profiles[1].get_shape("past_key_values.3.value")]
    assert cache == [(1, 3, 512, 64), (2, 3, 512, 64), (4, 3, 512, 64)]


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_both_profiles_share_one_copy_of_the_weights(precision: str, tmp_path: Path) -> None:
    """The plan with both is little larger than that of the prefill profile alone."""
    spec = replace(
        LARGE,
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=2,
        num_heads=8,
        max_position_embeddings=512,
        attention_layers=("global", "local"),
    )
    graph = write_hollow_graphs(spec, precision, tmp_path)["prefill"]
    weights = next(tmp_path.glob("selective*.bin"))
    with weights.open("r+b") as file:  # no two tensors alike, or they might be shared as such
        numbers = np.random.default_rng(0).integers(0, 1 << 10, weights.stat().st_size // 2)
        file.write((numbers | 0x2000).astype(np.uint16).tobytes())
    options = EngineOptions(opt_length=128, max_length=512, max_logit_positions=64)
    sizes = {}
    for profiles in ((PREFILL_PROFILE,), (DECODE_PROFILE, PREFILL_PROFILE)):
        builder = flavour().module.Builder(flavour().logger)
        parsed = parse_graph(flavour(), builder, graph)
        config = build_module._configure(flavour(), builder, ADA, options)
        for profile in profiles:
            made = builder.create_optimization_profile()
            for index in range(parsed.network.num_inputs):
                tensor = parsed.network.get_input(index)
                shapes = profile_shapes(tensor.name, tuple(tensor.shape), profile, options)
                made.set_shape(tensor.name, *shapes)
            config.add_optimization_profile(made)
        sizes[profiles] = builder.build_serialized_network(parsed.network, config).nbytes
    alone, both = sizes.values()
    assert alone < 1.2 * weights.stat().st_size
    assert both - alone < 0.2 * weights.stat().st_size


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantized_inputs_build(precision: str, tmp_path: Path) -> None:
    spec = replace(LARGE, vocab_size=100, hidden_size=256, num_heads=2, intermediate_size=1024)
    spec = replace(spec, num_layers=2, attention_layers=("global", "local"))
    graph = write_hollow_graphs(spec, precision, tmp_path, lambda _: 6.0)["prefill"]
    options = EngineOptions(opt_length=128, max_length=512, max_logit_positions=64)
    plan, warnings = build_module._serialize(
        flavour(), ADA, graph, options, lambda *_: None, tmp_path / "timing.cache"
    )
    assert plan.nbytes > 1.5e6
    assert warnings == []


def test_foreign_operators_are_named_node_by_node(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("FastGelu", ["x"], ["a"], domain="com.microsoft", name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="known"),
        helper.make_node("Mystery", ["b"], ["y"], domain="test", name="second"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in "xy"]
    graph = helper.make_graph(nodes, "foreign", ends[:1], ends[1:])
    opsets = [helper.make_opsetid(*pair) for pair in (("", 24), ("com.microsoft", 1), ("test", 1))]
    path = tmp_path / "foreign.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=12), str(path))
    with pytest.raises(EngineError) as caught:
        parse(path)
    message = str(caught.value)
    assert "node 0 first (FastGelu): " in message
    assert "node 2 second (Mystery): " in message
    assert message.count("Plugin not found") == 2, "the parser's own words"
    assert "known" not in message


def test_the_graph_of_the_cpu_target_is_refused(mini_bundle: Path) -> None:
    with pytest.raises(
        EngineError,
        match=r"(?s)refuses.*GroupQueryAttention\): .*failed to load GroupQueryAttention plugin",
    ):
        parse(mini_bundle / "prefill.onnx")
    with pytest.raises(BundleError, match=r"target cpu.*--target tensorrt"):
        read_bundle(mini_bundle)


def test_an_interrupt_stops_the_build(bundle: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if "Building engine" in stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(bundle, EngineRequest(), flavour(), ADA, interrupt)
    assert not (bundle / ENGINES_FOLDER).exists()


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """As in a terminal: what a script runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_the_build(bundle: Path, heeds_ctrl_c: None) -> None:
    """Python's own interrupt would be raised inside NVIDIA's code, which drops it and goes on."""
    steps: list[tuple[str, int, int]] = []

    def press(stage: str, done: int, total: int) -> None:
        steps.append((stage, done, total))
        if "Building engine" in stage and not done:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_engine(bundle, EngineRequest(), flavour(), ADA, press)
    assert signal.getsignal(signal.SIGINT) is before
    assert not (bundle / ENGINES_FOLDER).exists()
    stopped = len(steps)
    steps.clear()
    build_engine(bundle, EngineRequest(), flavour(), ADA, lambda *step: steps.append(step))
    assert stopped < len(steps) - 2


def test_an_interrupt_is_the_monitors_no(heeds_ctrl_c: None) -> None:
    with kept_interrupt() as interrupted:
        monitor = progress_monitor(flavour(), lambda *_: None, interrupted)
        monitor.phase_start("Building engine", None, 5)
        assert monitor.step_complete("Building engine", 0)
        signal.raise_signal(signal.SIGINT)
        assert not monitor.step_complete("Building engine", 1)


def test_ctrl_c_that_is_ignored_stays_ignored() -> None:
    """As in a job that a script runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with kept_interrupt() as interrupted:
            signal.raise_signal(signal.SIGINT)
        assert not interrupted.is_set()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_failure_of_the_builder_is_told_in_its_own_words(bundle: Path) -> None:
    """No lean runtime comes with TensorRT for RTX."""
    request = EngineRequest(version_compatible=True)
    with pytest.raises(EngineError, match=r"(?s)could not build.*libnvinfer_lean"):
        build_engine(bundle, request, flavour(), ADA)
    assert not (bundle / ENGINES_FOLDER).exists()


def test_a_failed_write_leaves_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(build_module.OutputError, match="No space left"):
        build_engine(bundle, EngineRequest(max_length=8), flavour(), ADA)
    assert list((bundle / ENGINES_FOLDER).iterdir()) == []


def test_what_would_be_lost_after_the_build_is_told_before_it(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "parse_graph", lambda *_: pytest.fail("it began"))
    with pytest.raises(RequestError, match="times no kernels"):
        build_engine(bundle, EngineRequest(), flavour(), ADA, timing_cache=bundle / "timings")
    timing = Flavour("tensorrt", flavour().module)  # the one that times kernels
    with pytest.raises(build_module.OutputError, match="folder of --timing-cache, does not exist"):
        build_engine(bundle, EngineRequest(), timing, ADA, timing_cache=bundle / "no" / "file")
    (bundle / ENGINES_FOLDER).write_bytes(b"")
    with pytest.raises(build_module.OutputError, match=r"cannot be written .*directory"):
        build_engine(bundle, EngineRequest(), flavour(), ADA)


def test_an_altered_graph_is_refused(bundle: Path) -> None:
    path = bundle / "prefill.onnx"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleDamagedError, match=r"prefill\.onnx does not match its checksum"):
        read_bundle(bundle)
    path.unlink()
    with pytest.raises(BundleDamagedError, match=r"prefill\.onnx is missing"):
        read_bundle(bundle)


def test_command_line(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(bundle), "--compute-capability", "8.9", "--max-length", "32", "--json"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert (bundle / ENGINES_FOLDER / record["file"]).stat().st_size == record["size"]
    assert record["options"]["max_length"] == 32
    assert "TensorRT: Building engine" in err
    assert main([str(bundle), "--list"]) == 0
    listed = capsys.readouterr().out
    assert record["file"] in listed
    assert "another bundle" not in listed
    # neo-verify's view of the bundle does not change by a plan.
    manifest = Manifest.from_json((bundle / "neo.json").read_text())
    assert record["bundle_digest"] == manifest.digest
    assert not any(name.startswith(ENGINES_FOLDER) for name in manifest.files)


@pytest.mark.skipif(local_device() is not None, reason="a GPU is here")
def test_no_gpu(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bundle)]) == 2
    assert "driver was found on this machine; name the comp" in capsys.readouterr().err


def test_a_capability_that_is_not_built_for(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(bundle), "--compute-capability", "9.0"]) == 2
    assert "cannot build for compute capability 9.0, expected one of" in capsys.readouterr().err
    assert main([str(bundle), "--compute-capability", "ada"]) == 2
    assert "expected MAJOR.MINOR, such as 8.9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "status", "reason"),
    [
        (KeyboardInterrupt(), 130, "interrupted, the bundle {} was written, its plan was not; "),
        (EngineError("no room"), 2, "the bundle {} was written, its plan was not: no room"),
    ],
)
def test_a_plan_that_ends_early_leaves_the_bundle(
    raised: BaseException,
    status: int,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end(*_: object) -> None:
        raise raised

    monkeypatch.setattr("neo_export.engine.build.build_engine", end)
    command = ["-o", str(tmp_path / "b"), "--tensorrt", "--compute-capability", "8.9"]
    assert export_main([*command, "--max-length", "64"]) == status
    assert f"neo-export: {reason.format(tmp_path / 'b')}" in capsys.readouterr().err
    assert read_bundle(tmp_path / "b").target == "tensorrt"


def test_export_and_build_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["-o", str(tmp_path / "b"), "--fp16", "--tensorrt", "--max-length", "64", "--json"]
    assert export_main([*command, "--compute-capability", "8.9"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["target"] == "tensorrt"
    assert read_records(tmp_path / "b")[0].bundle_digest == summary["digest"]
    assert summary["engine"]["options"]["max_length"] == 64
    assert export_main([*command, "--force", "--target", "portable"]) == 2
    assert "choose one" in capsys.readouterr().err
    assert export_main(["-o", str(tmp_path / "c"), "--compute-capability", "8.9"]) == 2
    assert "can only be used with --tensorrt" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
