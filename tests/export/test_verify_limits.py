"""Which limits `neo-export --verify` holds a bundle to, and what it says where one is passed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.models import DEMO
from neo_export.comparison.verify import (
    PlaceError,
    Verification,
    _disagreements,
    _judge,
    _rounds_activations,
)
from neo_export.decisions.calibrated import Calibrated
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.targets import TARGETS
from neo_export.tolerances import LOCAL, TOLERANCES, limits_name, tolerance_name
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.errors import VerificationError

if TYPE_CHECKING:
    from pathlib import Path

    from neo_runtime.bundle.manifest import Manifest

PRECISIONS = {precision for target in TARGETS.values() for precision in target.precisions}


def test_every_precision_has_limits(mini_bundle: Path) -> None:
    assert TOLERANCES.keys() == PRECISIONS | {"int8-cache"}
    manifest = open_bundle(mini_bundle).manifest
    for precision in PRECISIONS:
        for dtype in ("float32", "float16", "bfloat16"):
            cache = replace(manifest.cache, dtype=dtype)
            assert limits_name(replace(manifest, precision=precision, cache=cache)) in LOCAL


@pytest.mark.parametrize(
    ("target", "precision", "calibrated", "limits"),
    [
        ("cpu", "fp32", False, "fp32"),
        ("cpu", "int8", False, "int8"),
        ("cpu", "int4", False, "int4"),
        ("cuda", "fp16", False, "fp16"),
        ("cuda", "int8", False, "fp16"),
        ("cuda", "int4", False, "fp16"),
        ("tensorrt", "int4", False, "fp16"),
        ("tensorrt", "int8", False, "fp16"),
        ("tensorrt", "int8", True, "int8"),
        ("tensorrt", "fp8", True, "fp8"),
    ],
)
def test_weights_alone_leave_half_precision(
    target: str,
    precision: str,
    calibrated: bool,
    limits: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against PyTorch on the stored weights: only rounded activations are worth more than that."""
    if calibrated:
        monkeypatch.setattr(Calibrated, "largest_input", lambda _self, _weight: 8.0)
    options = ExportOptions(target=target, precision=precision)
    export_bundle(str(DEMO), tmp_path / "bundle", options)
    manifest = open_bundle(tmp_path / "bundle").manifest
    rounds = _rounds_activations(tmp_path / "bundle", manifest)
    assert tolerance_name(manifest, rounds_activations=rounds) == limits


def _found(manifest: Manifest, **typical: float) -> Verification:
    """A bundle whose errors are `typical` at the named places, three times that at worst."""
    errors = {
        place: PlaceError(
            layer, place, worst=3 * typical.get(place, 0), typical=typical.get(place, 0)
        )
        for layer, place in ((17, "attended"), (17, "mlp"), (None, "logits"))
    }
    return Verification(
        tokens=544,
        window_size=manifest.model.window_size,
        logits=errors["logits"],
        argmax_disagreements=0,
        worst_place=errors["attended"],
        places=(errors["attended"], errors["mlp"]),
        first_fault=None,
    )


def _judged(found: Verification, manifest: Manifest, *, rounds_activations: bool) -> None:
    _judge(found, manifest, tolerance_name(manifest, rounds_activations=rounds_activations))


def test_the_median_of_the_logits_has_a_limit(cuda_bundle: Path) -> None:
    """Errors inside have none: sharp attention amplifies any rounding."""
    manifest = open_bundle(cuda_bundle).manifest
    limit = TOLERANCES["fp16"].any_checkpoint
    _judged(
        _found(manifest, logits=limit, attended=1.0, mlp=0.5), manifest, rounds_activations=True
    )
    words = r"^the logits are off by 0\.09 .* the limit of fp16 is 0\.08\. Every step is right"
    with pytest.raises(VerificationError, match=words):
        _judged(_found(manifest, logits=0.09), manifest, rounds_activations=True)


@pytest.mark.parametrize("worst", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["places", "logits"])
def test_one_position_that_is_not_finite_is_refused(
    worst: float, place: str, cuda_bundle: Path
) -> None:
    manifest = open_bundle(cuda_bundle).manifest
    found = _found(manifest)
    error = replace(found.logits, worst=worst)
    found = replace(found, **{place: (error,) if place == "places" else error})
    with pytest.raises(VerificationError, match=r"^logits holds values that are not finite"):
        _judged(found, manifest, rounds_activations=True)


def test_the_limit_that_is_named_is_the_one_that_was_passed(cuda_bundle: Path) -> None:
    manifest = replace(open_bundle(cuda_bundle).manifest, precision="int4")
    _judged(_found(manifest, logits=0.09), manifest, rounds_activations=True)
    with pytest.raises(VerificationError, match=r"the limit of fp16 is 0\.08\."):
        _judged(_found(manifest, logits=0.09), manifest, rounds_activations=False)


def test_a_near_tie_that_rounding_decides_is_no_fault() -> None:
    """Two errors, up and down, swap logits that are further apart than either of them."""
    limit = TOLERANCES["fp16"].any_checkpoint
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((64, 4096)).astype(np.float32)
    best, second = expected.argsort(axis=1)[:, [-1, -2]].T
    rows = np.arange(len(expected))
    expected[rows, best] += 1  # no third token near
    expected[rows, second] = expected[rows, best] - 1.5 * limit
    found = expected.copy()
    found[rows, best] = expected[rows, best] - limit
    found[rows, second] = expected[rows, best] - limit / 2
    assert (found.argmax(1) == second).all()
    assert _disagreements(found, expected, limit) == 0


def test_a_position_that_is_off_as_a_whole_is_judged_by_its_norm_alone() -> None:
    """Sharp attention amplifies rounding at single positions: that is what the median is for."""
    limit = TOLERANCES["fp16"].any_checkpoint
    expected = np.random.default_rng(0).standard_normal((8, 4096)).astype(np.float32)
    expected[3, 5] = 9  # a clear lead
    found = expected.copy()
    found[3] = -expected[3]
    assert found[3].argmax() != expected[3].argmax()
    assert _disagreements(found, expected, limit) == 0


def test_one_wrong_logit_of_many_is_found(cuda_bundle: Path) -> None:
    """Its error is far below the limit of the row: 1 % of the norm."""
    limit = TOLERANCES["fp16"].any_checkpoint
    expected = np.zeros((2, 50257), np.float32)
    expected[:, ::2], expected[:, 1::2] = 1, -1
    expected[:, 10] = 2
    found = expected.copy()
    found[1, 7] = 2.5
    assert _disagreements(found, expected, limit) == 1
    manifest = open_bundle(cuda_bundle).manifest
    wrong = replace(_found(manifest), argmax_disagreements=1)
    with pytest.raises(VerificationError, match=r"differs from PyTorch's at 1 of 544 positions"):
        _judged(wrong, manifest, rounds_activations=False)
