"""`neo-engine` without TensorRT: what it refuses before anything is imported or built."""

from __future__ import annotations

import subprocess
import sys
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from neo_export.engine import device as device_module
from neo_export.engine import flavour as flavour_module
from neo_export.engine.build import read_bundle
from neo_export.engine.cli import main
from neo_export.engine.device import Device, device_for
from neo_export.engine.flavour import Flavour, find_flavour
from neo_export.engine.network import profile_shapes
from neo_export.engine.ranges import EngineRequest, resolve_options
from neo_runtime.errors import DependencyError, EngineError, RequestError

if TYPE_CHECKING:
    from pathlib import Path


def install(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Let exactly these modules be installed; None for one that cannot be loaded."""

    def find_spec(name: str) -> ModuleSpec | None:
        return ModuleSpec(name, None) if name in versions else None

    def import_module(name: str) -> ModuleType:
        if versions[name] is None:
            raise OSError("libnvinfer.so.11: cannot open shared object file")
        module: Any = ModuleType(name)
        module.__version__ = versions[name]
        module.OnnxParser = object
        return module

    monkeypatch.setattr(flavour_module.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(flavour_module.importlib, "import_module", import_module)


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(DependencyError, match=r"neither.*neo-onnx\[tensorrt\].*\[tensorrt-rtx\]"):
        find_flavour()
    with pytest.raises(DependencyError, match=r"TensorRT is not installed.*neo-onnx\[tensorrt\]"):
        find_flavour("tensorrt")


def test_both_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tensorrt="11.4.0.106", tensorrt_rtx="1.7.1.116")
    with pytest.raises(DependencyError, match=r"both.*--flavour tensorrt_rtx"):
        find_flavour()
    assert find_flavour("tensorrt").version == "11.4.0.106"
    assert find_flavour("tensorrt_rtx").product == "TensorRT for RTX"


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("tensorrt", "10.16.1.11", "TensorRT 10.16.1.11 is installed, expected 11.0 or newer"),
        ("tensorrt_rtx", "1.6.1.120", "RTX 1.6.1.120 is installed, expected 1.7 or newer"),
        ("tensorrt", None, "cannot be loaded .*libnvinfer"),
        ("tensorrt", "", "incomplete"),
    ],
)
def test_unusable(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str | None, message: str
) -> None:
    install(monkeypatch, **{name: version})
    with pytest.raises(DependencyError, match=message):
        find_flavour()


def test_the_full_tensorrt_builds_on_its_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Flavour("tensorrt", ModuleType("tensorrt"))
    monkeypatch.setattr(device_module, "local_device", lambda: None)
    with pytest.raises(EngineError, match="run neo-engine on the machine with the GPU"):
        device_for(full, None)
    with pytest.raises(EngineError, match=r"8\.9, but this machine has no GPU"):
        device_for(full, "8.9")
    hopper = Device("9.0", "NVIDIA H100")
    monkeypatch.setattr(device_module, "local_device", lambda: hopper)
    assert device_for(full, None) == device_for(full, "9.0") == hopper
    with pytest.raises(EngineError, match=r"8\.9, but this GPU has 9\.0"):
        device_for(full, "8.9")


def test_rtx_does_not_run_on_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built for an H100 all the same, its plan was refused there: "Supported: None"."""
    module: Any = ModuleType("tensorrt_rtx")
    module.__version__ = "1.7.1.116"
    module.ComputeCapability = Enum("ComputeCapability", ["NONE", "CURRENT", "SM89", "SM120"])
    rtx = Flavour("tensorrt_rtx", module)
    monkeypatch.setattr(device_module, "local_device", lambda: Device("9.0", "NVIDIA H100"))
    with pytest.raises(EngineError, match=r"not run on NVIDIA H100, .* 9\.0, .* 8\.9, 12\.0"):
        device_for(rtx, None)
    assert device_for(rtx, "8.9") == Device("8.9", None)
    ada = Device("8.9", "NVIDIA L4")
    monkeypatch.setattr(device_module, "local_device", lambda: ada)
    assert device_for(rtx, None) == ada


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (EngineRequest(max_length=513), "--max-length is 513, expected at most 512"),
        (EngineRequest(min_length=9, max_length=8), "--min-length 9.*contradict"),
        (EngineRequest(opt_length=9, max_length=8), "--opt-length 9.*contradict"),
        (EngineRequest(min_length=0), "--min-length 0"),
        (EngineRequest(opt_batch=3, max_batch=2), "--opt-batch 3 and --max-batch 2"),
        (EngineRequest(max_logit_positions=9, max_length=8), "--max-logit-positions is 9.*8"),
        (EngineRequest(optimization_level=6), "--optimization-level is 6, expected 0 to 5"),
        (EngineRequest(workspace_bytes=0), "--workspace is 0"),
    ],
)
def test_contradictions(request_: EngineRequest, message: str, tensorrt_bundle: Path) -> None:
    with pytest.raises(RequestError, match=message):
        resolve_options(request_, read_bundle(tensorrt_bundle))


def test_defaults_come_from_the_bundle(tensorrt_bundle: Path) -> None:
    options = resolve_options(EngineRequest(), read_bundle(tensorrt_bundle))
    assert (options.min_length, options.opt_length, options.max_length) == (1, 128, 512)
    assert (options.opt_batch, options.max_batch, options.max_logit_positions) == (1, 1, 256)
    shapes = profile_shapes("input_ids", (-1, -1), 1, options)
    assert shapes == ((1, 1), (1, 128), (1, 512))


def test_contradictions_are_told_before_tensorrt_is_looked_for(
    tensorrt_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    assert main([str(tensorrt_bundle), "--max-length", "8", "--opt-length", "9"]) == 2
    assert "contradict each other" in capsys.readouterr().err
    assert main([str(tensorrt_bundle), "--max-batch", "0"]) == 2
    assert "--max-batch is 0" in capsys.readouterr().err
    assert main([str(tensorrt_bundle)]) == 2
    assert "neither TensorRT nor" in capsys.readouterr().err


def test_a_folder_that_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "expected a folder written by neo-export" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["much", "inf", "nan", "1e400G", "G"])
def test_what_is_no_size_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bundle", "--workspace", text])
    assert f"{text!r} is not a size" in capsys.readouterr().err


def test_sizes_have_suffixes() -> None:
    from neo_export.engine.cli import _bytes

    assert [_bytes(text) for text in ("7", "2k", "512M", "1.5GiB")] == [
        7,
        2048,
        512 << 20,
        3 << 29,
    ]


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys, contextlib\nfrom neo_export.engine.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "heavy = {'numpy', 'onnx', 'onnx_ir', 'tensorrt', 'tensorrt_rtx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--compute-capability" in done.stdout
