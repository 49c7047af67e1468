"""What `import neo_runtime` brings along: nothing of the export machine, nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import neo_runtime
import pytest

RUNTIME = Path(neo_runtime.__file__).parents[1]
EXPORT_MACHINE = {
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "safetensors",
    "tensorrt",
    "tensorrt_rtx",
    "cuda",
}


def modules_after(statements: str) -> set[str]:
    """Top-level modules of a bare interpreter that has run `statements`."""
    code = (
        f"import json, sys; sys.path.insert(0, {str(RUNTIME)!r})\n"
        f"before = set(sys.modules)\n{statements}\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(json.dumps(sorted(new)))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_alone_is_light() -> None:
    found = modules_after("import neo_runtime")
    assert "neo_runtime" in found
    assert not found & (EXPORT_MACHINE | {"numpy", "onnxruntime", "tokenizers", "argparse"})


def test_generating_loads_nothing_of_the_export_machine(mini_bundle: Path) -> None:
    found = modules_after(
        "import neo_runtime\n"
        f"model = neo_runtime.load({str(mini_bundle)!r}, threads=1)\n"
        "assert 'onnxruntime' in sys.modules\n"
        "model.generate('Once', max_new_tokens=3)\n"
        "model.generate('Once', max_new_tokens=3, num_beams=2)\n"
        "model.logits([1, 2])"
    )
    assert {"numpy", "onnxruntime", "tokenizers"} <= found
    assert not found & EXPORT_MACHINE


def test_onnxruntime_is_imported_by_load_only() -> None:
    found = modules_after("import neo_runtime\nneo_runtime.load, neo_runtime.Model")
    assert "numpy" in found
    assert not found & (EXPORT_MACHINE | {"onnxruntime", "tokenizers"})


def test_backends_load_their_engines_only_when_opened() -> None:
    modules = (
        "choice",
        "device.nvidia",
        "cuda.backend",
        "cuda.weights",
        "tensorrt.backend",
        "tensorrt.store",
    )
    found = modules_after("".join(f"import neo_runtime.backends.{name}\n" for name in modules))
    assert not found & (EXPORT_MACHINE | {"onnxruntime", "tokenizers"})


def test_every_public_name_exists() -> None:
    assert neo_runtime.__all__ == sorted(neo_runtime.__all__)
    for name in neo_runtime.__all__:
        assert getattr(neo_runtime, name).__name__ == name
        assert name in dir(neo_runtime)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = neo_runtime.nothing


def test_what_a_report_of_a_fault_wants(mini_bundle: Path) -> None:
    assert neo_runtime.__version__ == version("neo-onnx")
    with neo_runtime.load(mini_bundle, threads=1) as model:
        digest = model.manifest.digest[:12]
        expected = (
            f"<neo_runtime.Model {mini_bundle.name}: fp32, target cpu, on CPU, digest {digest}>"
        )
        assert repr(model) == expected
