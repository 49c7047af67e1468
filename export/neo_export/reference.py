"""PyTorch's GPT-Neo, one layer at a time: the reference without the whole model in memory.

Uses transformers' own modules with `attn_implementation="eager"` (its flash-attention path
ignores the window) in float32. Only the layer that is running has its weights loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from neo_runtime.errors import DependencyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from neo_export.checkpoint import Checkpoint

__all__ = ["LayeredReference"]

Place = tuple[int | None, str]


class LayeredReference:
    """Runs token ids through the checkpoint, yielding hidden states place by place."""

    def __init__(
        self, checkpoint: Checkpoint, read: Callable[[str], NDArray[np.float32]] | None = None
    ) -> None:
        """Prepare; nothing is loaded yet.

        Args:
            checkpoint: the model.
            read: gives a weight by name, in place of the checkpoint's own.

        Raises:
            DependencyError: torch or transformers is missing.
        """
        try:
            import torch
            from transformers import GPTNeoConfig
            from transformers.models.gpt_neo import modeling_gpt_neo
        except ImportError as error:
            raise DependencyError(
                f"comparing with PyTorch needs the package {error.name}; "
                "install neo-onnx with its extra: pip install 'neo-onnx[torch]'"
            ) from error
        self._torch: Any = torch
        self._modules: Any = modeling_gpt_neo
        self._config = GPTNeoConfig.from_dict(checkpoint.config_json)
        self._config._attn_implementation = "eager"
        self._tied = checkpoint.spec.tie_word_embeddings
        self._read = read or (lambda name: checkpoint.tensors[name].read())

    def places(self, ids: NDArray[np.int64]) -> Iterator[tuple[Place, NDArray[np.float32]]]:
        """Yield ((layer, place), hidden states [S, width]) in the order of computation.

        Args:
            ids: token ids [S], one sequence from position 0.
        """
        torch = self._torch
        with torch.inference_mode():
            hidden = torch.from_numpy(self.embed(ids))[None]
            yield (None, "embedding"), hidden[0].numpy()
            for layer in range(self._config.num_layers):
                for place, value in self._block(layer, hidden):
                    hidden = value if place == "residual" else hidden
                    yield (layer, place), value[0].numpy()
            yield (None, "final_norm"), self.load_final_norm()(hidden)[0].numpy()

    def embed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Token ids [S] from position 0 → the sum of both tables' rows, [S, H]."""
        positions = self._read("transformer.wpe.weight")[: len(ids)]
        embedded: NDArray[np.float32] = self._read("transformer.wte.weight")[ids] + positions
        return embedded

    def load_block(self, layer: int) -> Any:
        """The `GPTNeoBlock` of one layer, ready to run; its weights are private copies."""
        block = self._modules.GPTNeoBlock(self._config, layer).eval()
        return self._load(block, f"transformer.h.{layer}.")

    def load_final_norm(self) -> Any:
        """The `torch.nn.LayerNorm` behind the last layer."""
        norm = self._torch.nn.LayerNorm(self._config.hidden_size, self._config.layer_norm_epsilon)
        return self._load(norm, "transformer.ln_f.")

    def logits(self, final: NDArray[np.float32]) -> NDArray[np.float32]:
        """The head: [S, H] after the final norm → [S, V]."""
        table = self._read("transformer.wte.weight" if self._tied else "lm_head.weight")
        torch = self._torch
        with torch.inference_mode():
            scores = torch.nn.functional.linear(torch.tensor(final), torch.from_numpy(table.copy()))
        result: NDArray[np.float32] = scores.numpy()
        return result

    def _block(self, layer: int, hidden: Any) -> Iterator[tuple[str, Any]]:
        block = self.load_block(layer)
        seen: dict[str, Any] = {}
        attention = block.attn.attention
        for name, module in (
            ("key", attention.k_proj),
            ("value", attention.v_proj),
            ("attention", attention.out_proj),
            ("mlp", block.mlp),
        ):
            module.register_forward_hook(
                lambda _module, _inputs, output, name=name: seen.__setitem__(name, output)
            )
        seen["residual"] = block(hidden)[0]
        for place in ("key", "value", "attention", "mlp", "residual"):
            yield place, seen[place]

    def _load(self, module: Any, prefix: str) -> Any:
        state = {
            name: self._torch.from_numpy(np.array(self._read(prefix + name)))
            for name in module.state_dict()
        }
        module.load_state_dict(state, assign=True)
        return module
