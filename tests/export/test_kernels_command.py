"""`neo-kernels`: what is compiled without a GPU, where it goes, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import onnx
import pytest
from helpers.interpreted_kernels import kernels_of
from helpers.models import DEMO
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.kernels.build import planned_steps
from neo_export.kernels.cli import main
from neo_export.kernels.compiler import compile_variant
from neo_export.kernels.graph import read_graph
from neo_export.kernels.launches import ROW_SIZES, plan_step
from neo_runtime.backends.cuda.kernels import fitting_kernels
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.bundle.step_kernels import StepKernels, find_kernels, kernels_path, read_kernels
from neo_runtime.command.verify import main as verify
from neo_runtime.errors import DependencyError, EngineError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels") / "int4"
    export_bundle(str(DEMO), folder, ExportOptions(target="cuda", precision="int4"))
    return folder


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """In a process that compiles; this one interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "neo_export.kernels.cli", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_compiles_every_kernel_without_a_gpu(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = run(str(bundle), "--compute-capability", "9.0", "--json")
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False), ended.stderr
    told = json.loads(ended.stdout)
    path = kernels_path(bundle, "9.0")
    assert told["path"] == str(path)
    assert [*find_kernels(bundle)] == [path]
    found = read_kernels(path)
    assert (found.bundle_digest, found.overlap) == (open_bundle(bundle).manifest.digest, True)
    assert [step.max_rows for step in found.steps] == list(ROW_SIZES)
    for kernel in found.kernels:
        assert kernel.binary().startswith(b"\x7fELF")
        assert kernel.name.encode() in kernel.binary()
        assert b".py" not in kernel.binary(), "paths of the machine that compiled it"
    # What is interpreted in the other tests is what is launched here.
    assert launches(found) == launches(kernels_of(bundle))
    assert fitting_kernels(open_bundle(bundle), "9.0") == found
    assert fitting_kernels(open_bundle(bundle), "8.9") is None
    assert verify([str(bundle)]) == 0
    assert f"kernels {path.name}: compute capability 9.0, triton" in capsys.readouterr().out


def launches(kernels: StepKernels) -> list[Any]:
    """The steps, and what each kernel was made for, whether launches overlap or not."""
    made = [
        (one.program, {**one.constants, "PDL": None}, one.types, one.threads)
        for one in kernels.kernels
    ]
    return [made, kernels.steps, kernels.memory_bytes]


def test_kernels_of_another_bundle_are_refused(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "b"
    export_bundle(str(DEMO), other, ExportOptions(target="cuda", precision="fp16"))
    path = kernels_path(other, "9.0")
    path.parent.mkdir()
    path.write_text(kernels_of(bundle).to_json())
    with pytest.raises(EngineError, match=r"does not fit: .* build the kernels again .* or delete"):
        fitting_kernels(open_bundle(other), "9.0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:100], "is not valid JSON"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 9'), "version 9"),
        (lambda text: text.replace('"kernel": 0', '"kernel": 999'), "launches kernel 999, but"),
        (lambda text: text.replace('"times": 1}', '"times": "1"}'), "expected int"),
    ],
)
def test_damaged_files(change: Any, message: str, bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "cuda-sm90.kernels"
    path.write_text(change(kernels_of(bundle).to_json()))
    with pytest.raises(Exception, match=message) as caught:
        read_kernels(path)
    assert "neo-kernels" in str(caught.value)


def test_a_damaged_kernel_is_seen(bundle: Path) -> None:
    whole = kernels_of(bundle)
    spoiled = replace(whole.kernels[0], image=whole.kernels[1].image)
    with pytest.raises(EngineError, match=r"does not match its checksum; build the kernels again"):
        spoiled.binary()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compute-capability", "nine"], "is 'nine', expected one of 8.0, 8.6"),
        (["--compute-capability", "7.5"], "is '7.5', expected one of 8.0, 8.6"),
        ([], "or name the GPUs to compile for, such as --compute-capability 9.0"),
    ],
)
def test_wrong_usage(
    words: list[str], message: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(bundle), *words]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""


@pytest.mark.parametrize("words", [["--compute-capability", "9.0"], []])
def test_other_targets(
    words: list[str], mini_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before a GPU is looked for."""
    assert main([str(mini_bundle), *words]) == 2
    assert "was exported for cpu, expected cuda; export" in capsys.readouterr().err
    assert not find_kernels(mini_bundle)


def test_an_interpreter_does_not_compile(bundle: Path) -> None:
    step, *_ = planned_steps(open_bundle(bundle), overlap=True)
    with pytest.raises(DependencyError, match="TRITON_INTERPRET is set"):
        compile_variant(step.launches[0].variant, "9.0")


def test_a_graph_that_computes_something_else_is_refused(bundle: Path) -> None:
    """By the name of the operator that has no kernel: nothing is left out in silence."""
    graph = onnx.load(bundle / "decode.onnx", load_external_data=False)
    for node in graph.graph.node:
        if node.op_type == "FastGelu":
            node.op_type, node.name = "Relu", "other_activation"
            break
    with pytest.raises(EngineError, match="Relu other_activation, expected one FastGelu"):
        read_graph(graph, 4096)


@pytest.mark.parametrize(
    ("operator", "attribute", "value"),
    [("GroupQueryAttention", "do_rotary", 1), ("GroupQueryAttention", "kv_num_heads", 1)],
)
def test_attention_of_another_kind_is_refused(
    operator: str, attribute: str, value: int, bundle: Path
) -> None:
    graph = onnx.load(bundle / "decode.onnx", load_external_data=False)
    node = next(node for node in graph.graph.node if node.op_type == operator)
    for one in node.attribute:
        if one.name == attribute:
            one.i = value
    with pytest.raises(EngineError, match=f"there is no kernel for {operator} "):
        read_graph(graph, 4096)


def test_another_residual_stream_is_refused(bundle: Path) -> None:
    graph = onnx.load(bundle / "decode.onnx", load_external_data=False)
    sums = [node for node in graph.graph.node if node.op_type == "SkipLayerNormalization"]
    sums[2].input[1] = sums[0].output[3]
    with pytest.raises(EngineError, match="the sum of a product and the residual stream"):
        read_graph(graph, 4096)


def test_a_tensor_with_another_reader_is_refused(bundle: Path) -> None:
    """What else is computed of it would be lost."""
    graph = onnx.load(bundle / "decode.onnx", load_external_data=False)
    node = next(node for node in graph.graph.node if node.op_type == "GroupQueryAttention")
    graph.graph.node.append(onnx.helper.make_node("Neg", [node.output[0]], ["other"], "reader"))
    with pytest.raises(EngineError, match=r"is read by .*Neg reader, expected one MatMul"):
        read_graph(graph, 4096)


@pytest.mark.parametrize("rows", ROW_SIZES)
def test_matrices_that_32_bits_do_not_count_are_refused(rows: int, bundle: Path) -> None:
    """Addresses would wrap around, and nothing would say so."""
    opened = open_bundle(bundle)
    graph = read_graph(onnx.load(bundle / "decode.onnx", load_external_data=False), 4096)
    inputs = graph.head.inputs
    most = (2**31 - 1) // inputs
    for outputs, fits in ((most, True), (most + 1, False)):
        large = replace(graph, head=replace(graph.head, outputs=outputs))
        if fits:
            assert plan_step(large, opened.manifest, rows, overlap=False).launches
            continue
        with pytest.raises(EngineError, match=f"a matrix of {outputs} × {inputs} elements, exp"):
            plan_step(large, opened.manifest, rows, overlap=False)
