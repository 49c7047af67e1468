from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.bench_samples import machine, model_spec, row
from neo_runtime.errors import ContextLengthError, RequestError
from neo_tools.arguments import labels_of
from neo_tools.bench import machine as machine_module
from neo_tools.bench import traffic
from neo_tools.bench.bandwidth import _distinct_values, _kernels, time_threads
from neo_tools.bench.cases import Case, Settings, check_lengths, make_cases, positions_needed
from neo_tools.bench.machine import (
    CpuWatch,
    busy_warning,
    cached_weights_warning,
    hidden_warning,
    small_buffer_warning,
)
from neo_tools.bench.opening import BundleInfo
from neo_tools.bench.participants import Participant
from neo_tools.bench.rounds import CaseRecord
from neo_tools.bench.rows import FLOAT32_DECODE, make_ratios, make_row, with_limits
from neo_tools.bench.spread import percentile, round_ratios, spread
from neo_tools.bench.traffic import StepWeights
from neo_tools.older_cpu import ENVIRONMENT_VARIABLE
from onnx import TensorProto, helper

if TYPE_CHECKING:
    from pathlib import Path

    from neo_runtime.bundle.manifest import Manifest


@pytest.mark.parametrize("percent", [0, 12.5, 50, 99, 100])
def test_percentile_is_numpys(percent: float) -> None:
    values = [0.4, 0.1, 7.0, 0.2, 0.3, 0.25]
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert percentile([3.0], percent) == 3.0


def test_ratios_are_taken_round_by_round() -> None:
    # The median of ratios is 4; the ratio of medians would be 2.
    ratios = round_ratios([2.0, 8.0, 4.0], [2.0, 2.0, 1.0])
    assert ratios == [1.0, 4.0, 4.0]
    assert spread(ratios).median == 4.0
    assert (spread(ratios).min, spread(ratios).max) == (1.0, 4.0)
    with pytest.raises(RequestError, match="2 rounds of one and 1"):
        round_ratios([1.0, 2.0], [1.0])


def test_cases_are_the_cross_product() -> None:
    cases = make_cases(
        prompts=(16, 0, 8), new_tokens=(4,), depths=(5, 6), batches=(1, 2), threads=(3,)
    )
    names = [(case.batch, case.name) for case in cases]
    one = ["pp16", "pp8", "tg4 @ d5", "tg4 @ d6"]
    assert names == [(1, name) for name in one] + [(2, name) for name in one]
    assert [case.tokens for case in cases] == [16, 8, 4, 4, 32, 16, 8, 8]
    with pytest.raises(RequestError, match="nothing to measure"):
        make_cases(prompts=(0,), new_tokens=(0,), depths=(5,), batches=(1,), threads=(1,))


def test_lengths_are_checked_before_anything_runs() -> None:
    decode = Case(kind="decode", threads=1, batch=1, new_tokens=8, depth=50)
    assert positions_needed(decode, 3, keep_context=False) == 58
    assert positions_needed(decode, 3, keep_context=True) == 74
    settings = Settings(bundles=(), cases=(decode,), repetitions=3)
    check_lengths(settings, 58, "m")
    with pytest.raises(ContextLengthError, match="needs 58 positions, but m has 57"):
        check_lengths(settings, 57, "m")
    with pytest.raises(ContextLengthError, match="leave --keep-context out"):
        check_lengths(replace(settings, keep_context=True), 58, "m")


def _graph(path: Path) -> Path:
    """A tied table and a part of it under three names, two looked-up tables, a constant."""

    def external(name: str, kind: int, dims: list[int], offset: int, length: int) -> TensorProto:
        tensor = TensorProto(name=name, data_type=kind, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        entries = (("location", "weights.bin"), ("offset", offset), ("length", length))
        for key, value in entries:
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    initializers = [
        external("table", TensorProto.UINT8, [10, 4], 0, 40),
        external("table.rows", TensorProto.UINT8, [10, 2, 2], 0, 40),
        external("table.scales", TensorProto.FLOAT, [10, 1], 40, 40),
        external("positions", TensorProto.FLOAT16, [6, 8], 100, 96),
        external("columns", TensorProto.INT8, [3, 12], 200, 36),
        external("more.columns", TensorProto.INT8, [2, 5], 600, 10),
        external("bias", TensorProto.FLOAT, [10], 300, 40),
        external("matrix", TensorProto.FLOAT, [2, 3], 500, 24),
        external("table.half", TensorProto.UINT8, [5, 4], 0, 20),
        external("unused", TensorProto.FLOAT, [10], 400, 40),
        helper.make_tensor("inline", TensorProto.INT64, [2], [1, 2]),
    ]
    nodes = [
        helper.make_node(
            "GatherBlockQuantized", ["table.rows", "ids", "table.scales"], ["a"], block_size=16
        ),
        helper.make_node("MatMulNBits", ["x", "table", "table.scales"], ["b"]),
        helper.make_node("MatMulNBits", ["x", "table.half", "table.scales"], ["h"]),
        helper.make_node("Gather", ["positions", "ids"], ["c"]),
        helper.make_node("Transpose", ["columns"], ["columns.turned"], perm=[1, 0]),
        helper.make_node("Gather", ["columns.turned", "ids"], ["d"]),
        helper.make_node("Transpose", ["more.columns"], ["more.turned"]),
        helper.make_node("Gather", ["more.turned", "ids"], ["j"]),
        helper.make_node("Transpose", ["matrix"], ["matrix.turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "matrix.turned"], ["i"]),
        helper.make_node("Add", ["b", "bias"], ["e"]),
        helper.make_node("Add", ["e", "bias"], ["f"]),
        helper.make_node("Reshape", ["f", "inline"], ["g"]),
    ]
    graph = helper.make_graph(nodes, "decode", [], [], initializers)
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def test_decode_weights_count_each_byte_once(tmp_path: Path) -> None:
    weights = traffic.decode_weights(_graph(tmp_path / "decode.onnx"))
    # table 40 + scales 40 + bias 40 + matrix 24 + inline 16; the unused tensor is not read.
    assert weights.dense == 160
    # positions: 96 bytes / 6 rows; columns: 36 bytes / 12 of axis 1, the first of the turned ones;
    # and 10 / 5, turned by default.
    assert weights.per_row == 16 + 3 + 2
    assert weights.total(4) == 160 + 4 * 21


def test_decode_weights_of_the_demo_model(mini_bundle: Path) -> None:
    weights = traffic.decode_weights(mini_bundle / "decode.onnx")
    matrices = 4 * (4 * 192 * 192 + 2 * 192 * 768)
    vectors = 4 * (4 * 192 + 2 * 192 + 768) + 2 * 192
    expected = 4 * (matrices + vectors + 4096 * 192)
    assert expected <= weights.dense <= expected + 200  # and a few constants of shapes
    assert 4 * 192 <= weights.per_row <= 4 * 192 + 16


def test_cache_bytes_follow_the_window() -> None:
    model = model_spec()  # one global and one local layer, window 4, 2 heads of 4
    position = 2 * 2 * 4 * 4  # key and value, heads, head_dim, float32
    at = {d: traffic.cache_bytes_per_step(model, itemsize=4, batch=1, depth=d) for d in (1, 9)}
    assert at[1] == position * (2 + 2)
    assert at[9] == position * (10 + 4)
    mean = traffic.cache_bytes_per_step(model, itemsize=4, batch=3, depth=1, steps=4)
    # 2, 3, 4, 5 positions in the global layer; 2, 3, 4, 4 in the local one.
    assert mean == position * 3 * (14 + 13) / 4


def test_flops_are_two_a_weight_and_four_a_position() -> None:
    model = model_spec()
    layer = 4 * 8 * 8 + 2 * 8 * 32
    step = 2 * (2 * layer + 100 * 8)
    assert traffic.decode_flops(model, batch=1, depth=9) == step + 4 * 8 * (10 + 4)
    assert traffic.decode_flops(model, batch=5, depth=9) == 5 * (step + 4 * 8 * 14)
    # Positions 1…6 in the global layer, 4 for the last in the local one, which is the last layer:
    # it needs keys and values of all, the rest of it and the head once.
    expected = 6 * 2 * layer + 6 * 2 * 2 * 8 * 8 + 2 * (layer - 2 * 8 * 8) + 2 * 100 * 8
    expected += 4 * 8 * (21 + 4)
    assert traffic.prefill_flops(model, batch=2, length=6) == 2 * expected


def test_nominal_weights() -> None:
    model = model_spec()
    body, head = 2 * (4 * 8 * 8 + 2 * 8 * 32), 100 * 8
    assert traffic.nominal_weights(model, "bf16").dense == 2 * (body + head)
    int4 = traffic.nominal_weights(model, "int4").dense
    assert int4 == round(body * 0.51953125 + head)


@pytest.fixture
def info(mini_bundle: Path) -> BundleInfo:
    from neo_runtime.bundle.folder import open_bundle

    manifest: Manifest = open_bundle(mini_bundle).manifest
    small = replace(manifest, model=model_spec(), precision="int8")
    return BundleInfo(
        label="ours",
        path=mini_bundle,
        manifest=small,
        weights=StepWeights(dense=1000, per_row=10),
    )


def _participant(label: str, kind: Any, precision: str) -> Participant:
    return Participant(label=label, kind=kind, precision=precision, worker=None)


def test_row_of_a_decode(info: BundleInfo) -> None:
    case = Case(kind="decode", threads=1, batch=2, new_tokens=4, depth=1)
    measured = CaseRecord(
        rounds=[[0.1, 0.1, 0.1, 0.1], [0.2, 0.2, 0.2, 0.6]], readings=[20000.0, 40000.0]
    )
    found = make_row(case, _participant("ours", "bundle", "int8"), measured, [info])
    assert found.round_seconds == pytest.approx((0.4, 1.2))
    assert found.tokens_per_second.max == pytest.approx(8 / 0.4)
    assert found.tokens_per_second.min == pytest.approx(8 / 1.2)
    assert found.token_p50_seconds == pytest.approx(0.15)
    cache = 2 * 2 * 4 * 4 * 2 * (14 + 13) / 4
    assert found.weight_bytes == 1020
    assert found.step_bytes == 1020 + cache
    assert found.bytes_per_token == (1020 + cache) / 2
    assert found.read_rate == pytest.approx((1020 + cache) / 0.2)
    assert found.round_limit_share is not None
    assert found.round_limit_share.max == pytest.approx((1020 + cache) * 4 / 0.4 / 20000)
    assert found.round_limit_share.min == pytest.approx((1020 + cache) * 4 / 1.2 / 40000)
    assert found.first_token_seconds is None


def test_row_of_a_prefill_and_of_a_peer(info: BundleInfo) -> None:
    prefill = Case(kind="prefill", threads=1, batch=2, prompt=5)
    measured = CaseRecord(rounds=[[0.5], [0.25], [1.0]], readings=[1e4, 1e4, 1e4])
    found = make_row(prefill, _participant("torch:bf16", "peer", "bf16"), measured, [info])
    assert found.tokens_per_second.median == pytest.approx(20)
    assert found.first_token_seconds == 0.5
    assert found.step_bytes is None
    assert found.round_limit_share is None
    assert found.token_p50_seconds is None
    assert found.bytes_are_nominal
    decode = Case(kind="decode", threads=1, batch=1, new_tokens=1, depth=9)
    peer = make_row(decode, _participant("torch:bf16", "peer", "bf16"), measured, [info])
    # bfloat16 weights and a bfloat16 cache.
    assert peer.step_bytes == 2 * (2 * 768 + 800) + 2 * 2 * 4 * 2 * 14


def test_limit_takes_the_float32_decode_where_it_is_faster() -> None:
    slow = row(label="a", precision="fp32", read_rate=9e9)
    none = row(read_rate=None, limit_share=None)
    rows, read = with_limits([slow, row(read_rate=5e9), none], {"memchr": 1e10})
    assert read == {"memchr": 1e10, FLOAT32_DECODE: 9e9}
    assert [r.limit_share for r in rows] == [pytest.approx(0.9), pytest.approx(0.5), None]
    rows, read = with_limits([replace(slow, read_rate=2e10), row(read_rate=5e9)], {"memchr": 1e10})
    assert [r.limit_share for r in rows] == [pytest.approx(1.0), pytest.approx(0.25)]
    # A peer's nominal bytes, or another precision, are no measurement of the machine.
    peer = row(kind="peer", precision="fp32", read_rate=9e10)
    rows, read = with_limits([peer, row(read_rate=8e10)], {"memchr": 1e10})
    assert read == {"memchr": 1e10}


def test_ratios_are_peers_over_bundles_and_the_first_bundle_over_the_rest() -> None:
    case = Case(kind="prefill", threads=1, batch=1, prompt=1)
    participants = [
        _participant("a", "bundle", "fp32"),
        _participant("b", "bundle", "int4"),
        _participant("p", "peer", "fp32"),
    ]
    measured = {
        "a": CaseRecord(rounds=[[2.0], [2.0]]),
        "b": CaseRecord(rounds=[[1.0], [0.5]]),
        "p": CaseRecord(rounds=[[3.0], [1.0, 4.0]]),
    }
    found = {(r.other, r.bundle): r.rounds for r in make_ratios(case, participants, measured)}
    assert found == {("p", "a"): (1.5, 2.5), ("p", "b"): (3.0, 10.0), ("a", "b"): (2.0, 4.0)}


def test_labels_are_folder_names_or_paths(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "m", tmp_path / "b" / "m", tmp_path / "c"]
    assert labels_of((paths[0], paths[2])) == ["m", "c"]
    assert labels_of(tuple(paths)) == [str(paths[0]), str(paths[1]), "c"]
    with pytest.raises(RequestError, match="named twice"):
        labels_of((paths[2], tmp_path / "a" / ".." / "c"))


def test_busy_machines_are_told() -> None:
    assert busy_warning(machine(load_average=0.2)) is None
    assert busy_warning(machine(load_average=None)) is None
    warning = busy_warning(machine(load_average=1.5))
    assert warning is not None
    assert "1.50 on 2 processors" in warning
    assert small_buffer_warning(machine(), None) is None
    assert small_buffer_warning(machine(), 1 << 30) is None
    assert "the cache" in (small_buffer_warning(machine(), 64 << 20) or "")


def test_weights_that_the_cache_holds_are_told() -> None:
    cache = 32 << 20
    assert cached_weights_warning(machine(l3_bytes=cache), {"large": cache + 1}) is None
    assert cached_weights_warning(machine(l3_bytes=None), {"small": 1000}) is None
    found = cached_weights_warning(machine(l3_bytes=cache), {"large": cache + 1, "small": cache})
    assert found is not None
    assert found.startswith("the weights of small (33.6 MB) fit in the last-level cache of 34 MB:")


def test_hidden_instructions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    assert hidden_warning() is None
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "AVX-512 and AMX")
    assert (hidden_warning() or "").startswith("AVX-512 and AMX are hidden from all who take part")


def test_cpu_watch_leaves_own_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {"_system_seconds": [100.0, 130.0], "_own_seconds": [1.0, 11.0]}
    for name, values in clocks.items():
        monkeypatch.setattr(machine_module, name, iter(values).__next__)
    monkeypatch.setattr(machine_module.time, "monotonic", iter([0.0, 20.0]).__next__)
    # 30 s of processor time in 20 s, 10 of them ours.
    warning = CpuWatch().warning(2)
    assert warning is not None
    assert "1.00 of 2 processors" in warning


def test_probe_values_and_kernels_read_all() -> None:
    values = _distinct_values(5000)
    assert values.min() >= 1
    assert values.max() < 2
    assert len(np.unique(values)) > 4000
    kernels = _kernels()
    assert kernels["memchr"](values) is None  # not found, so all was searched
    values.view(np.uint8)[-1] = 1
    assert kernels["memchr"](values) == values.ctypes.data + values.nbytes - 1
    assert kernels["numpy max"](values[:-1]) == values[:-1].max()


def test_threads_run_together_and_their_errors_show() -> None:
    seen: list[int] = []
    assert time_threads([lambda: seen.append(1), lambda: seen.append(2)]) >= 0
    assert sorted(seen) == [1, 2]

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        time_threads([fail, lambda: None])
