"""Faults in bfloat16, which no engine here runs: ONNX's evaluator computes the places.

It rounds every step, those inside a norm as well, so it is further off than a fused kernel is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from helpers import faults
from helpers.held_out import held_out_ids
from helpers.models import DEMO
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.comparison.errors import measure, measure_logits
from neo_export.comparison.faults import find_faults
from neo_export.comparison.probed import probed_model, probed_values
from neo_export.comparison.reference import LayeredReference
from neo_export.comparison.trace import Text, Trace
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.tolerances import limits_name
from neo_runtime.bundle.folder import open_bundle
from onnx import helper
from onnx.reference import ReferenceEvaluator

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from neo_export.comparison.faults import Fault

LENGTH = 96


def trace_of(folder: Path) -> Trace:
    """Every position's places, in numpy's bfloat16."""
    manifest = open_bundle(folder).manifest
    data = probed_model(folder, manifest, "score")
    probed = folder / "probed.onnx"  # beside its weights
    probed.write_bytes(data)
    evaluator = ReferenceEvaluator(str(probed))
    probed.unlink()
    positions = np.arange(LENGTH)[None]
    ids = held_out_ids(1, 512)[0][None, :LENGTH]
    feeds: dict[str, Any] = {
        "input_ids": ids,
        "position_ids": positions,
        "logit_positions": positions,
    }
    for value in onnx.load_from_string(data).graph.input:
        if value.name.startswith("past_key_values."):
            kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            feeds[value.name] = np.zeros((1, *shape[1:]), dtype=kind)
    names = ["logits", *probed_values(manifest)]
    with np.errstate(all="ignore"):
        found = dict(zip(names, evaluator.run(names, feeds), strict=True))
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    probes = {(probe.layer, probe.place): probe for probe in manifest.probes}
    values = {name: found[name][0] for name in names[1:]}
    return Trace.scored(probes, values, found["logits"][0])


def find(source: Path, folder: Path) -> list[Fault]:
    export_bundle(str(source), folder, ExportOptions(target="tensorrt", precision="bf16"))
    manifest, trace = open_bundle(folder).manifest, trace_of(folder)
    assert limits_name(manifest) == "bf16"
    with open_checkpoint(DEMO) as checkpoint:
        reference = LayeredReference(checkpoint)
        text = Text(held_out_ids(1, 512)[0][:LENGTH], [trace])
        errors, [final] = measure(reference, [text])
        measure_logits(errors, reference, trace, reference.logits(final))
    return find_faults(errors, manifest.model, "bf16")


def test_rounding_is_no_fault(tmp_path: Path) -> None:
    assert find(DEMO, tmp_path / "bundle") == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: faults.missing_bias(1, "c_proj"),
        lambda: faults.wrong_matrix(3, "out_proj", 1),
        lambda: faults.wrong_matrix(2, "ln_1", 0),
        lambda: faults.wrong_matrix(1, "ln_2", 3),
        lambda: faults.other_window(63, 64, 1),
    ],
    ids=["c_proj's bias", "out_proj", "ln_1", "ln_2", "window"],
)
def test_a_fault_is_named(make: Callable[[], faults.Fault], tmp_path: Path) -> None:
    fault = make()
    spoiled = faults.spoiled_checkpoint(DEMO, tmp_path / "checkpoint", fault)
    first = find(spoiled, tmp_path / "bundle")[0]
    assert first.layer == fault.layer
    # Without its explanation a norm shows as the products behind it.
    assert first.place in fault.places or (fault.places[0] == "ln_1" and first.place == "query")
