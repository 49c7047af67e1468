"""A made-up benchmark run with round numbers."""

from __future__ import annotations

from typing import Any

from neo_runtime.bundle.manifest import ModelSpec
from neo_tools.bench.machine import Machine
from neo_tools.bench.results import Limits, ParticipantFacts, Ratio, Results, Row
from neo_tools.bench.spread import spread


def model_spec(**changes: Any) -> ModelSpec:
    values: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 8,
        "intermediate_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "window_size": 4,
        "attention_layers": ("global", "local"),
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": (0,),
        "pad_token_id": None,
    }
    return ModelSpec(**values | changes)


def machine(**changes: Any) -> Machine:
    values: dict[str, Any] = {
        "cpu": "Some CPU | 3 GHz <fast>",
        "flags": ("avx2",),
        "cores": 2,
        "processors": 2,
        "l3_bytes": 32 << 20,
        "memory_bytes": 8 << 30,
        "system": "Linux 6",
        "python": "3.11.0",
        "versions": {"onnxruntime": "1.32.0"},
        "load_average": 0.1,
    }
    return Machine(**values | changes)


def row(**changes: Any) -> Row:
    """A bundle's decode at 10 GB/s: 1 GB and 0.1 s per step, 2 steps per round."""
    values: dict[str, Any] = {
        "label": "ours",
        "kind": "bundle",
        "precision": "int8",
        "test": "tg2 @ d8",
        "threads": 2,
        "batch": 1,
        "prompt": 0,
        "new_tokens": 2,
        "depth": 8,
        "round_seconds": (0.2, 0.1, 0.4),
        "tokens_per_second": spread([10.0, 20.0, 5.0]),
        "first_token_seconds": None,
        "token_p50_seconds": 0.1,
        "token_p99_seconds": 0.2,
        "private_bytes": 3_000_000,
        "proportional_bytes": 4_000_000,
        "cache_bytes": 1_000_000,
        "weight_bytes": 900_000_000,
        "step_bytes": 1e9,
        "bytes_are_nominal": False,
        "flops": 2e9,
        "read_rate": 1e10,
        "limit_share": 0.5,
        "round_limit_share": spread([0.8, 0.9, 0.7]),
        "python_seconds": 0.0001,
        "generate_python_seconds": 0.0002,
    }
    return Row(**values | changes)


def results(**changes: Any) -> Results:
    """Two participants with one prefill and one decode test each."""
    prefill = {
        "test": "pp16",
        "prompt": 16,
        "new_tokens": 0,
        "depth": 0,
        "first_token_seconds": 0.5,
        "token_p50_seconds": None,
        "token_p99_seconds": None,
        "step_bytes": None,
        "read_rate": None,
        "limit_share": None,
        "flops": 9e10,
    }
    peer = {
        "label": "torch:fp32",
        "kind": "peer",
        "precision": "fp32",
        "bytes_are_nominal": True,
        "cache_bytes": None,
        "python_seconds": None,
        "generate_python_seconds": None,
    }
    slow = {"round_seconds": (0.6, 0.4, 0.4), "tokens_per_second": spread([3.0, 5.0, 5.0])}
    facts = {"threads": 2, "source": "somewhere", "load_seconds": 1.5}
    rounds = (3.0, 4.0, 1.0)
    values: dict[str, Any] = {
        "machine": machine(),
        "limits": (
            Limits(
                threads=2,
                read={"memchr": 2e10, "numpy max": 1e10},
                rounds=(2e10, 1e10, 1.5e10),
                peak={"float32": 1e11, "int8": 4e11},
                buffer_bytes=None,
            ),
        ),
        "settings": {"repetitions": 3},
        "participants": (
            ParticipantFacts(
                label="ours",
                kind="bundle",
                precision="int8",
                first_load_seconds=9.0,
                first_token_seconds=0.7,
                first_token_prefill_seconds=0.2,
                weights_bytes=1_000_000,
                prepacked_bytes=2_500_000,
                **facts,
            ),
            ParticipantFacts(label="torch:fp32", kind="peer", precision="fp32", **facts),
        ),
        "rows": (row(**prefill), row(**prefill | peer), row(), row(**peer | slow)),
        "ratios": (
            Ratio(
                test="tg2 @ d8",
                threads=2,
                batch=1,
                other="torch:fp32",
                bundle="ours",
                rounds=rounds,
                spread=spread(rounds),
            ),
        ),
        "warnings": ("it was busy",),
    }
    return Results(**values | changes)
