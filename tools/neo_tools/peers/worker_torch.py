"""Worker of the peer torch: GPT-Neo in PyTorch, with transformers' dynamic key/value cache."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from neo_tools.peers.worker_options import parse_arguments
from neo_tools.worker.engine import engine_handlers
from neo_tools.worker.protocol import claim_stdout, serve

if TYPE_CHECKING:
    from pathlib import Path

PRECISIONS = ("fp32", "bf16", "fp16", "fp16-compiled")
"""The last two are for GPUs; "compiled" is `torch.compile` with dynamic shapes."""

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp16-compiled": "float16"}


class TorchEngine:
    """GPT-Neo with eager attention, the only one with correct local windows everywhere."""

    packages = ("torch", "transformers", "tokenizers")

    def __init__(self, model: Path, precision: str, threads: int, device: str = "cpu") -> None:
        self._folder = model
        self._precision = precision
        self._threads = threads
        self._device = device
        self._cache: Any = None
        self._model: Any = None
        self._config: Any = None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return int(self._config.vocab_size)

    @property
    def max_length(self) -> int:
        """Context length of the model, in tokens."""
        return int(self._config.max_position_embeddings)

    def load(self) -> dict[str, Any]:
        """Load the checkpoint in the chosen precision."""
        import torch
        from transformers import DynamicCache, GPTNeoForCausalLM

        torch.set_num_threads(self._threads)
        model: Any = GPTNeoForCausalLM.from_pretrained(
            self._folder,
            dtype=getattr(torch, _DTYPES[self._precision]),
            attn_implementation="eager",
        )
        self._model = model.eval().to(self._device)
        self._config = model.config
        if self._precision == "fp16-compiled":
            # Without `dynamic`, it compiles again for each new length. The first calls compile.
            self._model = torch.compile(self._model, dynamic=True)
        self._torch, self._new_cache = torch, DynamicCache
        facts = {"dtype": str(model.dtype), "cache": "append", "device": self._device}
        if self._device != "cpu":
            facts["gpu"] = torch.cuda.get_device_name(self._device)
        return {"threads": torch.get_num_threads(), **facts}

    def reset(self) -> None:
        """Empty the cache."""
        self._cache = None

    def forward(self, ids: list[list[int]]) -> list[int]:
        """Process rows of ids; the head computes only the last position."""
        torch = self._torch
        if self._cache is None:
            self._cache = self._new_cache(config=self._config)
        with torch.inference_mode():
            output = self._model(
                torch.tensor(ids, dtype=torch.int64, device=self._device),
                self._cache,  # its name depends on the version of transformers
                use_cache=True,
                logits_to_keep=1,
            )
            tokens: list[int] = output.logits[:, -1].argmax(-1).tolist()
        return tokens


def main(argv: list[str]) -> None:
    """Serve requests from stdin."""
    answers = claim_stdout()
    arguments = parse_arguments(argv, PRECISIONS)
    engine = TorchEngine(arguments.model, arguments.precision, arguments.threads, arguments.device)
    serve(engine_handlers(engine), sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
