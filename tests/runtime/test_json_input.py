"""JSON that no parser goes through: an error like any other, wherever it is given."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
from neo_export.quantize.plan import WeightPlan
from neo_runtime.backends.cpu import prepacked
from neo_runtime.bundle.engine_record import read_records
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.bundle.step_kernels import read_kernels
from neo_runtime.errors import BundleDamagedError, EngineError, RequestError
from neo_runtime.json_input import parse_json
from neo_runtime.text.documents import json_lines

if TYPE_CHECKING:
    from pathlib import Path

DEEP = "[" * 1_000_000  # more than the stack has room for


@pytest.mark.parametrize("text", [DEEP, DEEP.encode(), b"\xff", "{", ""], ids=range(5))
def test_one_kind_of_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"JSON|nested|decode|Expecting"):
        parse_json(text)
    assert parse_json(b'{"a": 1}') == {"a": 1}


def test_wherever_it_is_given(mini_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"f, line 1 is not valid JSON .*nested too deeply"):
        next(json_lines([DEEP], "f"))
    file = tmp_path / "files.json"
    file.write_text(DEEP)
    with pytest.raises(RequestError, match="is not valid JSON: it is nested too deeply"):
        WeightPlan.read(file)
    with pytest.raises(EngineError, match="nested too deeply"):
        read_kernels(file)
    assert not prepacked._is_whole(tmp_path)
    bundle = shutil.copytree(mini_bundle, tmp_path / "bundle")
    (bundle / "engines").mkdir(exist_ok=True)
    (bundle / "engines" / "a.json").write_text(DEEP)
    with pytest.raises(EngineError, match="nested too deeply"):
        read_records(bundle)
    (bundle / "engines" / "a.json").unlink()
    os.mkfifo(bundle / "engines" / "a.json")  # who opens it waits
    with pytest.raises(EngineError, match="it is no file"):
        read_records(bundle)
    with pytest.raises(EngineError, match="it is no file"):
        read_kernels(bundle / "engines" / "a.json")
    (bundle / "neo.json").write_text(DEEP)
    with pytest.raises(BundleDamagedError, match="nested too deeply"):
        open_bundle(bundle)
