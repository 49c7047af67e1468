"""One layer of PyTorch's GPT-Neo, with hooks at every place inside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from neo_export.gpt_neo.parameters import LAYER_MATRICES

if TYPE_CHECKING:
    from neo_export.comparison.reference import LayeredReference
    from neo_runtime.bundle.manifest import ModelSpec
    from numpy.typing import NDArray

__all__ = ["ObservedLayer"]


class ObservedLayer:
    """Runs contexts through one `GPTNeoBlock`."""

    def __init__(self, reference: LayeredReference, spec: ModelSpec, layer: int) -> None:
        """Load the layer's weights.

        Args:
            reference: provides the block, float32, `attn_implementation="eager"`.
            spec: the architecture.
            layer: its index.
        """
        import torch

        self._torch: Any = torch
        self._heads, self._head_dim = spec.num_heads, spec.head_dim
        local = spec.attention_layers[layer] == "local"
        self._window = spec.window_size if local else None
        self._block: Any = reference.load_block(layer)
        self._seen: dict[str, Any] = {}
        self._hooks: list[Any] = []
        modules = {matrix.gives: matrix.module for matrix in LAYER_MATRICES}
        modules |= {"ln_1": "ln_1", "ln_2": "ln_2", "gelu": "mlp.act"}
        for place, module in modules.items():
            hook = self._block.get_submodule(module).register_forward_hook(
                lambda _module, _inputs, output, place=place: self._see(place, output)
            )
            self._hooks.append(hook)
        hook = self._block.attn.attention.out_proj.register_forward_pre_hook(
            lambda _module, inputs: self._see("attended", inputs[0])
        )
        self._hooks.append(hook)

    def close(self) -> None:
        """Release the weights: the hooks refer to this object, which refers to the layer."""
        for hook in self._hooks:
            hook.remove()
        self._block, self._seen = None, {}

    def run(self, hidden: NDArray[np.float32]) -> dict[str, Any]:
        """Run one context, hidden states [S, H] → torch tensors [S, C] by place, unordered."""
        self._seen = {}
        with self._torch.inference_mode():
            output = self._block(self._torch.from_numpy(hidden)[None])
        self._see("residual", output[0] if isinstance(output, tuple) else output)
        return self._seen

    def score_max(self, query: Any, key: Any) -> NDArray[np.float32]:
        """Largest |q·k| of each head [N], over the pairs of positions that are not masked.

        Args:
            query: [S, H].
            key: [S, H].
        """
        torch = self._torch
        length = len(query)
        visible = torch.ones(length, length, dtype=torch.bool).tril_()
        if self._window is not None:
            visible = visible.triu_(1 - self._window)
        found = np.empty(self._heads, np.float32)
        for head in range(self._heads):
            columns = slice(head * self._head_dim, (head + 1) * self._head_dim)
            scores = query[:, columns] @ key[:, columns].T
            found[head] = float(scores.abs_().mul_(visible).max())
        return found

    def _see(self, place: str, value: Any) -> None:
        self._seen[place] = value[0]
