"""The reference: GPT-Neo in PyTorch, eager, with its own dynamic key/value cache."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from neo_tools.peers.worker_protocol import claim_stdout, parse_arguments, serve

if TYPE_CHECKING:
    from pathlib import Path

PRECISIONS = ("fp32", "bf16")


class TorchEngine:
    """`attn_implementation="eager"`: the only one whose local windows are right everywhere."""

    packages = ("torch", "transformers", "tokenizers")

    def __init__(self, model: Path, precision: str, threads: int) -> None:
        self._folder = model
        self._precision = precision
        self._threads = threads
        self._cache: Any = None
        self._model: Any = None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return int(self._model.config.vocab_size)

    @property
    def max_length(self) -> int:
        """Positions that the model has."""
        return int(self._model.config.max_position_embeddings)

    def load(self) -> dict[str, Any]:
        """Load the checkpoint in the wanted type."""
        import torch
        from transformers import GPTNeoForCausalLM

        torch.set_num_threads(self._threads)
        model: Any = GPTNeoForCausalLM.from_pretrained(
            self._folder,
            dtype=torch.bfloat16 if self._precision == "bf16" else torch.float32,
            attn_implementation="eager",
        )
        self._model = model.eval()
        self._torch = torch
        return {"threads": torch.get_num_threads(), "dtype": str(model.dtype), "cache": "append"}

    def reset(self) -> None:
        """Forget the cache."""
        self._cache = None

    def forward(self, ids: list[list[int]]) -> list[int]:
        """Append rows of ids; the head runs on the last position only."""
        torch = self._torch
        with torch.inference_mode():
            output = self._model(
                torch.tensor(ids, dtype=torch.int64),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            self._cache = output.past_key_values
            tokens: list[int] = output.logits[:, -1].argmax(-1).tolist()
        return tokens


def main(argv: list[str]) -> None:
    """Serve requests from stdin."""
    answers = claim_stdout()
    arguments = parse_arguments(argv, PRECISIONS)
    engine = TorchEngine(arguments.model, arguments.precision, arguments.threads)
    serve(engine, sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
