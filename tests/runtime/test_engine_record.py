"""Plans and machines that do not belong together, as facts: no GPU, no TensorRT."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from neo_runtime.bundle.engine_record import (
    ENGINES_FOLDER,
    EngineOptions,
    EngineRecord,
    MachineFacts,
    choose_engine,
    engine_key,
    read_records,
    why_unfit,
)
from neo_runtime.errors import BundleUnsupportedError, EngineError

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = "a" * 64
OPTIONS = EngineOptions(opt_length=128, max_length=512, max_logit_positions=64)
RECORD = EngineRecord(
    file="one.plan",
    size=4,
    sha256="0" * 64,
    bundle_digest=DIGEST,
    flavour="tensorrt",
    version="11.4.0.106",
    compute_capability="9.0",
    gpu="NVIDIA H100 80GB HBM3",
    platform="linux-x86_64",
    options=OPTIONS,
    build_seconds=12.5,
)
MACHINE = MachineFacts(
    flavour="tensorrt",
    version="11.4.0.106",
    compute_capability="9.0",
    gpu="NVIDIA H100 80GB HBM3",
    platform="linux-x86_64",
)


def test_the_machine_that_built_it_runs_it() -> None:
    assert why_unfit(RECORD, MACHINE, DIGEST) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"flavour": "tensorrt_rtx"}, "for TensorRT, this is TensorRT for RTX"),
        ({"version": "11.4.0.107"}, "built by TensorRT 11.4.0.106, this is 11.4.0.107"),
        ({"version": "11.3"}, "built by TensorRT 11.4.0.106, this is 11.3"),
        ({"compute_capability": "8.9"}, "compute capability 9.0.*has 8.9"),
        ({"gpu": "NVIDIA H200"}, "chosen on NVIDIA H100 80GB HBM3, this GPU is NVIDIA H200"),
        ({"platform": "win32-AMD64"}, "for linux-x86_64, this is win32-AMD64"),
    ],
)
def test_another_machine_is_refused(change: dict[str, Any], reason: str) -> None:
    found = why_unfit(RECORD, replace(MACHINE, **change), DIGEST)
    assert found is not None
    assert re.search(reason, found)


def test_another_bundle_is_refused() -> None:
    assert "another bundle" in (why_unfit(RECORD, MACHINE, "b" * 64) or "")


def test_a_plan_without_weights_is_refused() -> None:
    stripped = replace(RECORD, options=replace(OPTIONS, stripped=True))
    assert "without weights" in (why_unfit(stripped, MACHINE, DIGEST) or "")


@pytest.mark.parametrize(
    ("version", "fits"),
    [("11.4.0.106", True), ("11.5", True), ("11.4.1", True), ("11.3.9", False), ("12.0", False)],
)
def test_version_compatible_plans_run_on_newer_versions_of_the_major(
    version: str, fits: bool
) -> None:
    record = replace(RECORD, options=replace(OPTIONS, version_compatible=True))
    assert (why_unfit(record, replace(MACHINE, version=version), DIGEST) is None) == fits


def test_ahead_of_time_plans_fit_every_gpu_of_the_compute_capability() -> None:
    record = replace(RECORD, gpu=None)
    assert why_unfit(record, replace(MACHINE, gpu="NVIDIA H200"), DIGEST) is None
    assert why_unfit(record, replace(MACHINE, compute_capability="10.0"), DIGEST) is not None


def test_choice_prefers_the_largest_and_explains_every_refusal() -> None:
    larger = replace(RECORD, file="two.plan", options=replace(OPTIONS, max_batch=8))
    other = replace(RECORD, file="three.plan", compute_capability="8.9")
    assert choose_engine([RECORD, larger, other], MACHINE, DIGEST) == larger
    picky = replace(larger, file="four.plan", options=replace(OPTIONS, max_batch=99, min_batch=2))
    assert choose_engine([picky, RECORD], MACHINE, DIGEST) == RECORD, "it takes single sequences"
    long = replace(larger, file="five.plan", options=replace(OPTIONS, max_batch=99, min_length=9))
    assert choose_engine([long, RECORD], MACHINE, DIGEST) == RECORD
    assert choose_engine([picky], MACHINE, DIGEST) == picky
    with pytest.raises(EngineError, match=r"three\.plan: it is for compute capability 8\.9.*build"):
        choose_engine([other], MACHINE, DIGEST)
    with pytest.raises(EngineError, match=r"there is none.*neo-engine"):
        choose_engine([], MACHINE, DIGEST)


def test_every_part_of_the_key_counts() -> None:
    parts: list[Any] = [DIGEST, OPTIONS, "tensorrt", "11.4", "9.0", None]
    changes = ["b" * 64, replace(OPTIONS, refit=True), "tensorrt_rtx", "11.5", "8.9", "H100"]
    keys = {engine_key(*parts)}
    for index, change in enumerate(changes):
        keys.add(engine_key(*[change if i == index else part for i, part in enumerate(parts)]))
    assert len(keys) == 7
    assert engine_key(*parts) in keys


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / ENGINES_FOLDER).mkdir()
    (tmp_path / ENGINES_FOLDER / "one.plan").write_bytes(b"plan")
    (tmp_path / ENGINES_FOLDER / "one.json").write_text(RECORD.to_json())
    return tmp_path


def test_records_are_read_back(bundle: Path, tmp_path: Path) -> None:
    assert read_records(bundle) == [RECORD]
    assert read_records(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("size", "4", "size.*found '4', expected int; build the plan again with neo-engine$"),
        ("flavour", "tensor", "flavour.*found 'tensor'"),
        ("file", "../one.plan", "outside of its folder"),
        ("file", "two.plan", "missing"),
        ("size", 5, "size is not 5 bytes"),
    ],
)
def test_a_damaged_record_is_an_error(bundle: Path, key: str, value: Any, message: str) -> None:
    raw = json.loads(RECORD.to_json()) | {key: value}
    (bundle / ENGINES_FOLDER / "one.json").write_text(json.dumps(raw))
    with pytest.raises(EngineError, match=message):
        read_records(bundle)


def test_a_record_of_another_schema_is_not_damaged(bundle: Path) -> None:
    raw = json.loads(RECORD.to_json()) | {"schema_version": 2}
    (bundle / ENGINES_FOLDER / "one.json").write_text(json.dumps(raw))
    with pytest.raises(BundleUnsupportedError, match="schema version 2, expected 1"):
        read_records(bundle)


def test_text_that_is_no_json_is_an_error(bundle: Path) -> None:
    (bundle / ENGINES_FOLDER / "one.json").write_text("{")
    with pytest.raises(EngineError, match="not valid JSON"):
        read_records(bundle)
