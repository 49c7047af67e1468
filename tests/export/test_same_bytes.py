"""A bundle's weights have the same bytes wherever they are made, by whichever kind of processor."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
from helpers.models import DEMO
from neo_export.exporter import ExportOptions, export_bundle

if TYPE_CHECKING:
    from pathlib import Path

# Of the demo model's weights.bin: found on x86-64, and the same on ARM64 (emulated). To be changed
# only with how weights are stored; a machine that finds others has arithmetic of its own.
CHECKSUMS = {
    ("cpu", "int8"): "6165c1f4b38074408b079dc9e0d3eb87103407fa2f6867436173d4eec0621491",
    ("cpu", "int4"): "f8b743d8d5559423117d2cfe1ff303295528344658a7c1eda797348c0ce76c9b",
    ("cuda", "int4"): "9a8518bdcb1f160915ca002f8d125f5bc211a4e4c20c63027137dd861b611ea5",
    ("tensorrt", "int8"): "d6ad6f83fc40c2ac361a9d24abde440fc2a8fe1bf93bb264184f90ef5bd9e640",
    ("tensorrt", "fp8"): "02f3a5827b1ee5d42b849266c64107c81e39c631563e3e485c4ac806ce4ab211",
}


@pytest.mark.parametrize(("target", "precision"), CHECKSUMS)
def test_weights_have_the_same_bytes(target: str, precision: str, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    export_bundle(str(DEMO), bundle, ExportOptions(target=target, precision=precision))
    found = hashlib.sha256((bundle / "weights.bin").read_bytes()).hexdigest()
    assert found == CHECKSUMS[target, precision]
