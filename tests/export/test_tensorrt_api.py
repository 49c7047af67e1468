"""What we call of TensorRT is in its own Python module as it is in TensorRT for RTX's.

Tests build with TensorRT for RTX, which needs no GPU. The full TensorRT's builder needs one even to
start, and its libraries are no package of PyPI; but its bindings are, and with libraries that have
nothing but the names that the bindings look for they can be imported, and asked what there is.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.fake_engine import FakeContext, FakeEngine
from helpers.nvidia import needs_tensorrt_rtx
from neo_export.engine import flavour
from neo_runtime.backends import tensorrt

if TYPE_CHECKING:
    from collections.abc import Iterator

COMPILER = shutil.which("cc")
pytestmark = [
    needs_tensorrt_rtx,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_bindings") is None,
        reason="tensorrt-cu13-bindings is not installed: its wheels are for Linux on x86-64",
    ),
    pytest.mark.skipif(COMPILER is None, reason="no C compiler (cc) to make empty libraries with"),
]

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
OF_RTX = {
    ("BuilderFlag", "REQUIRE_USER_ALLOCATION"),
    ("IExecutionContext", "is_stream_capturable"),
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
}
CLASSES_OF_RTX = {"ComputeCapability", "DynamicShapesKernelSpecializationStrategy"}
"""Only TensorRT for RTX builds for a GPU that is not there, and compiles kernels while it runs."""
LIST_API = r"""
import importlib, inspect, json, re, sys

module = importlib.import_module(sys.argv[1])

def signatures(name, member):
    # One a line, with a number in front where there are several.
    text = (getattr(member, "__doc__", None) or "") if callable(member) else ""
    found = re.findall(rf"^(?:\d+\. )?({re.escape(name)}\(.*)", text, re.MULTILINE)
    return [line for line in found if line != f"{name}(*args, **kwargs)"]

api = {
    name: {
        member: signatures(member, getattr(kind, member))
        for member in dir(kind)
        if not member.startswith("_")
    }
    for name, kind in inspect.getmembers(module, inspect.isclass)
}
print(json.dumps([module.__version__, api]))
"""

Api = dict[str, dict[str, list[str]]]


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("libraries")
    source = folder / "nothing.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for name in LIBRARIES:
        library = folder / f"lib{name}.so.11"
        command = [str(COMPILER), "-shared", "-fPIC", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
    return os.environ | {"LD_LIBRARY_PATH": str(folder)}


def api_of(module: str, environ: dict[str, str]) -> tuple[str, Api]:
    """Version, and classes → members → what each takes and returns; nothing of those of enums."""
    command = [sys.executable, "-c", LIST_API, module]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    version, api = json.loads(re.sub(r"\btensorrt\w*\.", "", done.stdout))
    return version, api


@cache
def names_used() -> frozenset[str]:
    """Every attribute that the code for TensorRT reads, of whatever object, and every string."""

    def found() -> Iterator[str]:
        folders = [Path(str(module.__file__)).parent for module in (tensorrt, flavour)]
        for source in chain.from_iterable(folder.glob("*.py") for folder in folders):
            for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    yield node.attr
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value

    return frozenset(found())


def test_what_is_used_is_in_both(environ: dict[str, str]) -> None:
    version, full = api_of("tensorrt_bindings", environ)
    _, rtx = api_of("tensorrt_rtx", dict(os.environ))
    assert int(version.split(".")[0]) >= 11
    assert (rtx.keys() - full.keys()) & names_used() == CLASSES_OF_RTX
    used = [
        (kind, member)
        for kind in rtx.keys() & full.keys()
        for member in rtx[kind].keys() & names_used()
        if (kind, member) not in OF_RTX
    ]
    missing = [name for name in used if name[1] not in full[name[0]]]
    assert not missing
    differing = [
        (kind, member, rtx[kind][member], full[kind][member])
        for kind, member in used
        if not set(rtx[kind][member]) <= set(full[kind][member])
    ]
    assert not differing
    # The list is of what we think it is.
    assert set(used) >= {
        ("Builder", "build_serialized_network"),
        ("BuilderFlag", "VERSION_COMPATIBLE"),
        ("IBuilderConfig", "progress_monitor"),
        ("IBuilderConfig", "set_timing_cache"),
        ("IOptimizationProfile", "set_shape"),
        ("OnnxParser", "parse_from_file"),
        ("ParserError", "node_name"),
        ("Runtime", "deserialize_cuda_engine"),
        ("ICudaEngine", "get_aliased_input_tensor"),
        ("ICudaEngine", "create_execution_context"),
        ("IExecutionContext", "set_tensor_address"),
        ("IExecutionContext", "execute_async_v3"),
    }
    assert sum(bool(rtx[kind][member]) for kind, member in used) > 20


def test_what_is_used_of_tensorrt_for_rtx_is_there() -> None:
    _, rtx = api_of("tensorrt_rtx", dict(os.environ))
    assert all(member in rtx[kind] for kind, member in OF_RTX)
    assert {member for _, member in OF_RTX} <= names_used()
    assert rtx.keys() >= CLASSES_OF_RTX


@pytest.mark.parametrize(
    ("fake", "kind"), [(FakeEngine, "ICudaEngine"), (FakeContext, "IExecutionContext")]
)
def test_the_stand_in_of_other_tests_has_nothing_else(fake: type, kind: str) -> None:
    _, rtx = api_of("tensorrt_rtx", dict(os.environ))
    assert {name for name in vars(fake) if not name.startswith("_")} <= rtx[kind].keys()
