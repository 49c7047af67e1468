"""Worker of the peer openvino: optimum-intel's stateful model on the CPU, through OpenVINO's API.

The cache is state of the inference request, used by the attention kernel without copies. The head
computes only the last position, as in OpenVINO GenAI. This is the fastest way to run this engine.

With int8 or int4 weights, the types of activations, attention and cache are the plugin's defaults,
chosen for speed on the machine (bfloat16 and a uint8 cache if the CPU has the instructions); `load`
reports them. With fp32, the plugin is told to prefer accuracy.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import TYPE_CHECKING, Any

from neo_tools.peers.worker_options import parse_arguments
from neo_tools.worker.engine import engine_handlers
from neo_tools.worker.protocol import claim_stdout, serve

if TYPE_CHECKING:
    from pathlib import Path

PRECISIONS = ("int8", "int4", "fp32")

_REPORTED = (
    "INFERENCE_PRECISION_HINT",
    "KV_CACHE_PRECISION",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "INFERENCE_NUM_THREADS",
    "NUM_STREAMS",
    "EXECUTION_MODE_HINT",
)


class OpenVinoEngine:
    """An inference request, whose state variables are the cache."""

    packages = ("openvino", "optimum-intel", "nncf", "transformers", "torch")

    def __init__(self, model: Path, precision: str, threads: int) -> None:
        self._folder = model
        self._precision = precision
        self._threads = threads
        self._depth = 0
        self._compiled: Any = None
        self._request: Any = None
        self._config: dict[str, Any] = {}

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return int(self._config["vocab_size"])

    @property
    def max_length(self) -> int:
        """Context length of the model, in tokens."""
        return int(self._config["max_position_embeddings"])

    def load(self) -> dict[str, Any]:
        """Read, modify and compile the exported model."""
        # Imported by name, as these packages exist only in the peer's environment.
        openvino = importlib.import_module("openvino")
        self._numpy = importlib.import_module("numpy")
        self._config = json.loads((self._folder / "config.json").read_text(encoding="utf-8"))
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": 1,
        }
        if self._precision == "fp32":
            options["EXECUTION_MODE_HINT"] = "ACCURACY"
        core = openvino.Core()
        model = core.read_model(self._folder / "openvino_model.xml")
        head = _last_position_only(openvino, model)
        compiled = core.compile_model(model, "CPU", options)
        self._compiled = compiled
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}
        details = {name: _plain(compiled, name) for name in _REPORTED}
        return {**details, "head": head, "cache": "inside the request"}

    def reset(self) -> None:
        """Empty the cache, by creating a new request.

        `reset_state()` would reuse the request. But then OpenVINO 2026.4.1 returns NaN for the
        second row of a batch after a batch of one (bfloat16 with a uint8 cache, prompt in several
        chunks).
        """
        self._request = None
        self._request = self._compiled.create_infer_request()
        self._depth = 0

    def forward(self, ids: list[list[int]]) -> list[int]:
        """Process rows of ids."""
        np = self._numpy
        batch, length = len(ids), len(ids[0])
        total = self._depth + length
        offered = {
            "input_ids": np.array(ids, dtype=np.int64),
            "attention_mask": np.ones((batch, total), dtype=np.int64),
            "position_ids": np.tile(np.arange(self._depth, total, dtype=np.int64), (batch, 1)),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        feed = {name: value for name, value in offered.items() if name in self._inputs}
        self._request.start_async(feed, share_inputs=True)
        self._request.wait()
        logits = self._request.get_tensor("logits").data
        self._depth = total
        tokens: list[int] = logits[:, -1].argmax(-1).tolist()
        return tokens


def _last_position_only(openvino: Any, model: Any) -> str:
    """Gather the last position before the head's matrix product, as OpenVINO GenAI does.

    Returns:
        The positions for which the head computes logits, in words.
    """
    opset = importlib.import_module("openvino.opset15")
    result = model.output("logits").get_node()
    head = result.input(0).get_source_output().get_node()
    if head.get_type_name() != "MatMul":
        return "every position"
    hidden = head.input(0).get_source_output()
    numpy = importlib.import_module("numpy")
    last = opset.gather(
        hidden, opset.constant(numpy.array([-1], dtype=numpy.int64)), opset.constant(1)
    )
    head.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
    return "last position"


def _plain(compiled: Any, name: str) -> str:
    try:
        return str(compiled.get_property(name))
    except RuntimeError:  # this version of the plugin lacks the property
        return "unknown"


def main(argv: list[str]) -> None:
    """Serve requests from stdin."""
    answers = claim_stdout()
    arguments = parse_arguments(argv, PRECISIONS)
    engine = OpenVinoEngine(arguments.model, arguments.precision, arguments.threads)
    serve(engine_handlers(engine), sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
