"""Worker of the peer optimum: `ORTModelForCausalLM` on ONNX Runtime's CPU provider.

The exported graph computes logits at every position, also in prefill. Its users pay for that, so it
is part of the measurement.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from neo_tools.peers.worker_options import parse_arguments
from neo_tools.worker.engine import engine_handlers
from neo_tools.worker.protocol import claim_stdout, serve

if TYPE_CHECKING:
    from pathlib import Path

PRECISIONS = ("fp32",)


class OptimumEngine:
    """Calls the model directly, without the bookkeeping of `generate`."""

    packages = ("optimum", "optimum-onnx", "onnxruntime", "transformers", "torch")

    def __init__(self, model: Path, threads: int) -> None:
        self._folder = model
        self._threads = threads
        self._past: Any = None
        self._depth = 0
        self._model: Any = None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return int(self._model.config.vocab_size)

    @property
    def max_length(self) -> int:
        """Context length of the model, in tokens."""
        return int(self._model.config.max_position_embeddings)

    def load(self) -> dict[str, Any]:
        """Open a session for the exported graph."""
        # Imported by name, as these packages exist only in the peer's environment.
        onnxruntime = importlib.import_module("onnxruntime")
        optimum = importlib.import_module("optimum.onnxruntime")
        self._torch = importlib.import_module("torch")
        self._torch.set_num_threads(self._threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        self._model = optimum.ORTModelForCausalLM.from_pretrained(
            self._folder,
            session_options=options,
            provider="CPUExecutionProvider",
            local_files_only=True,
        )
        return {"threads": self._threads, "cache": "append", "logits": "every position"}

    def reset(self) -> None:
        """Empty the cache."""
        self._past, self._depth = None, 0

    def forward(self, ids: list[list[int]]) -> list[int]:
        """Process rows of ids."""
        torch = self._torch
        batch, length = len(ids), len(ids[0])
        total = self._depth + length
        with torch.inference_mode():
            positions = torch.arange(self._depth, total).expand(batch, -1).contiguous()
            output = self._model(
                torch.tensor(ids, dtype=torch.int64),
                attention_mask=torch.ones(batch, total, dtype=torch.int64),
                position_ids=positions,
                past_key_values=self._past,
                use_cache=True,
            )
            self._past = output.past_key_values
            tokens: list[int] = output.logits[:, -1].argmax(-1).tolist()
        self._depth = total
        return tokens


def main(argv: list[str]) -> None:
    """Serve requests from stdin."""
    answers = claim_stdout()
    arguments = parse_arguments(argv, PRECISIONS)
    serve(engine_handlers(OptimumEngine(arguments.model, arguments.threads)), sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
