"""PyTorch's GPT-Neo, one layer at a time: the reference without the whole model in memory.

Uses transformers' own modules with `attn_implementation="eager"` (its flash-attention path
ignores the window) in float32. Only the weights of the running layer are loaded.

    reference = LayeredReference(checkpoint)
    hidden = reference.embed(ids)
    for index in range(spec.num_layers):
        layer = reference.layer(index)        # loads its weights
        hidden = layer.places(hidden)["residual"]
    logits = reference.logits(reference.final_norm(hidden))

A layer can also be run step by step from any inputs, such as those that another engine computed.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
from neo_runtime.errors import DependencyError

from neo_export.files.mapped_memory import drop_pages
from neo_export.gpt_neo.parameters import EMBEDDING, LAYER_MATRICES, POSITIONS, head_name
from neo_export.quantize.kv_cache import stored_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from neo_export.checkpoint.whole import Checkpoint
    from neo_export.comparison.places import Place
    from neo_export.quantize.kv_cache import CacheSteps

__all__ = ["LayeredReference", "ReferenceLayer"]


class LayeredReference:
    """The parts of a checkpoint's model in float32, each loaded lazily."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        read: Callable[[str], NDArray[np.float32]] | None = None,
        cache: CacheSteps | None = None,
    ) -> None:
        """Prepare; nothing is loaded yet.

        Args:
            checkpoint: the model.
            read: returns a weight by name; None for the checkpoint's own weights.
            cache: the steps of an int8 cache; the attention uses keys and values rounded to them.

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
        self.spec = checkpoint.spec
        self._torch: Any = torch
        self._modules: Any = modeling_gpt_neo
        self._config = GPTNeoConfig.from_dict(checkpoint.config_json)
        self._config._attn_implementation = "eager"
        self._cache = cache
        self._read = read or (lambda name: checkpoint.tensors[name].read())

    def read(self, name: str) -> NDArray[np.float32]:
        """A weight by its name in the checkpoint."""
        return self._read(name)

    def with_weights(self, read: Callable[[str], NDArray[np.float32]]) -> LayeredReference:
        """The same model with other weights, read by their names in the checkpoint."""
        other = copy(self)
        other._read = read
        return other

    def embed(
        self, ids: NDArray[np.int64], positions: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Token ids [S] → token plus position embeddings [S, H]; by default from position 0."""
        chosen = np.arange(len(ids)) if positions is None else positions
        rows = self._read(EMBEDDING)[ids]
        result: NDArray[np.float32] = rows + self._read(POSITIONS)[chosen]
        return result

    def layer(self, index: int) -> ReferenceLayer:
        """Layer `index` with its weights in memory."""
        steps = None
        if self._cache is not None:
            steps = {"key": self._cache.key[index], "value": self._cache.value[index]}
        return ReferenceLayer(self._torch, self.load_block(index), steps)

    def load_block(self, layer: int) -> Any:
        """The `GPTNeoBlock` of one layer, ready to run; its weights are private copies."""
        block = self._modules.GPTNeoBlock(self._config, layer).eval()
        return self._load(block, f"transformer.h.{layer}.")

    def load_final_norm(self) -> Any:
        """The `torch.nn.LayerNorm` after the last layer."""
        norm = self._torch.nn.LayerNorm(self._config.hidden_size, self._config.layer_norm_epsilon)
        return self._load(norm, "transformer.ln_f.")

    def final_norm(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """[S, H] → [S, H]."""
        norm = self.load_final_norm()
        with self._torch.inference_mode():
            result: NDArray[np.float32] = norm(_tensor(self._torch, hidden)).numpy()
        return result

    def logits(self, final: NDArray[np.float32]) -> NDArray[np.float32]:
        """The head: [S, H] after the final norm → [S, V]."""
        table = self._read(head_name(tied=self.spec.tie_word_embeddings))
        torch = self._torch
        with torch.inference_mode():
            scores = torch.nn.functional.linear(_tensor(torch, final), _tensor(torch, table))
        drop_pages(table)
        result: NDArray[np.float32] = scores.numpy()
        return result

    def places(self, ids: NDArray[np.int64]) -> Iterator[tuple[Place, NDArray[np.float32]]]:
        """Yield ((layer, place), hidden states [S, width]) in the order of computation.

        Args:
            ids: token ids [S], one sequence from position 0.
        """
        hidden = self.embed(ids)
        yield (None, "embedding"), hidden
        for index in range(self.spec.num_layers):
            for place, value in self.layer(index).places(hidden).items():
                hidden = value
                yield (index, place), value
        yield (None, "final_norm"), self.final_norm(hidden)

    def _load(self, module: Any, prefix: str) -> Any:
        state = {}
        for name in module.state_dict():
            weight = self._read(prefix + name)
            state[name] = self._torch.from_numpy(np.array(weight))
            drop_pages(weight)
        module.load_state_dict(state, assign=True)
        return module


class ReferenceLayer:
    """One `GPTNeoBlock`, run as a whole or step by step. All arrays are float32."""

    def __init__(
        self, torch: Any, block: Any, steps: dict[str, NDArray[np.float32]] | None = None
    ) -> None:
        self._torch = torch
        self._steps = steps or {}
        self._block = block
        self._attention = block.attn.attention

    def places(self, hidden: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Run the block on hidden states [S, H] of positions 0 to S−1.

        Returns:
            query, key, value, attended, attention, mlp and residual, each [S, H], in the order of
            computation. Keys and values are those before an int8 cache rounds them.
        """
        seen: dict[str, Any] = {}

        def look(name: str, output: Any) -> Any:
            seen[name] = output
            if name not in self._steps:
                return None
            return _tensor(self._torch, stored_cache(output.numpy(), self._steps[name]))

        order = ("query", "key", "value", "attended", "attention", "mlp", "residual")
        handles = [
            self._block.get_submodule(matrix.module).register_forward_hook(
                lambda _module, _inputs, output, name=matrix.gives: look(name, output)
            )
            for matrix in LAYER_MATRICES
            if matrix.gives in order
        ]
        handles.append(
            self._attention.out_proj.register_forward_pre_hook(
                lambda _module, inputs: seen.__setitem__("attended", inputs[0])
            )
        )
        with self._torch.inference_mode():
            seen["residual"] = self._block(_tensor(self._torch, hidden)[None])[0]
        for handle in handles:
            handle.remove()
        return {name: seen[name].reshape(hidden.shape).numpy() for name in order}

    def project(self, hidden: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """[S, H] entering the layer → its query, key and value, [S, H] each."""
        x = self.norm("ln_1", hidden)
        return {name: self.product(f"{name[0]}_proj", x) for name in ("query", "key", "value")}

    def attend(
        self,
        query: NDArray[np.float32],
        key: NDArray[np.float32],
        value: NDArray[np.float32],
        *,
        window: int | None = -1,
        scale: float = 1.0,
    ) -> NDArray[np.float32]:
        """Attention before the output projection: [S, H] of the last S of T positions.

        Args:
            query: [S, H], of the last S positions.
            key: [T, H], of all positions of the text.
            value: [T, H].
            window: how many of the last positions each query sees; None for all, −1 for the layer's
                own window.
            scale: factor of the scores.
        """
        torch, attention = self._torch, self._attention
        own = attention.bias
        if self._steps:
            key = stored_cache(key, self._steps["key"])
            value = stored_cache(value, self._steps["value"])
        with torch.inference_mode():
            heads = [
                attention._split_heads(
                    _tensor(torch, x)[None], attention.num_heads, attention.head_dim
                )
                for x in (query * np.float32(scale) if scale != 1.0 else query, key, value)
            ]
            if window != -1:
                attention.bias = _mask(torch, len(key), window)
            try:
                mixed, _ = attention._attn(*heads)
            finally:
                attention.bias = own
            merged = attention._merge_heads(mixed, attention.num_heads, attention.head_dim)
            result: NDArray[np.float32] = merged[0].numpy()
        return result

    def norm(self, name: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """`ln_1` or `ln_2`: [S, H] → [S, H]."""
        return self._apply(getattr(self._block, name), x)

    def product(self, name: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """One matrix and its bias: `q_proj`, `k_proj`, `v_proj`, `out_proj`, `c_fc`, `c_proj`."""
        owner = self._block.mlp if name.startswith("c_") else self._attention
        return self._apply(getattr(owner, name), x)

    def matrix(self, name: str) -> NDArray[np.float32]:
        """The weight of a product, [out, in]."""
        owner = self._block.mlp if name.startswith("c_") else self._attention
        weight: NDArray[np.float32] = getattr(owner, name).weight.detach().numpy()
        return weight

    def activation(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The MLP's activation function."""
        return self._apply(self._block.mlp.act, x)

    def _apply(self, module: Any, x: NDArray[np.float32]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            result: NDArray[np.float32] = module(_tensor(self._torch, x)).numpy()
        return result

    def project_out(self, attended: NDArray[np.float32]) -> NDArray[np.float32]:
        """`attended` → `attention`, [S, H]."""
        return self.product("out_proj", attended)

    def mlp(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Hidden states [S, H] after the attention → the MLP's output, which is added to them."""
        return self._apply(self._block.mlp, self.norm("ln_2", hidden))


def _mask(torch: Any, length: int, window: int | None) -> Any:
    """Bool [1, 1, length, length], like `GPTNeoSelfAttention.bias`."""
    mask = torch.tril(torch.ones((length, length), dtype=torch.bool))
    if window is not None:
        mask = torch.bitwise_xor(mask, torch.tril(mask, -window))
    return mask.view(1, 1, length, length)


def _tensor(torch: Any, array: NDArray[np.float32]) -> Any:
    """A tensor that shares the array's memory if it is writable, otherwise a copy."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
