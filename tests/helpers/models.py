"""Tiny random GPT-Neo checkpoints, and PyTorch as their reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import neo_export
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEMO = Path(neo_export.__file__).parent / "demo" / "neo-mini"

Layers = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """The `GPTNeoConfig` values that tests vary."""

    vocab_size: int = 61
    num_heads: int = 2
    head_dim: int = 16
    intermediate_size: int | None = None
    attention_layers: Layers = ("global", "local")
    window_size: int = 8
    max_position_embeddings: int = 40
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim


ODD_CONFIGS: dict[str, TinyConfig] = {
    "plain": TinyConfig(),
    "untied_head": TinyConfig(tie_word_embeddings=False),
    "all_global": TinyConfig(attention_layers=("global", "global")),
    "all_local": TinyConfig(attention_layers=("local", "local")),
    "local_first": TinyConfig(attention_layers=("local", "local", "global")),
    "window_4": TinyConfig(window_size=4),
    "window_1": TinyConfig(window_size=1),
    "window_beyond_end": TinyConfig(window_size=64),
    "head_size_4": TinyConfig(head_dim=4, num_heads=4),
    "head_size_12": TinyConfig(head_dim=12, num_heads=3),
    "head_size_40": TinyConfig(head_dim=40),
    "head_size_80": TinyConfig(head_dim=80, num_heads=1),
    "intermediate_size": TinyConfig(intermediate_size=52, layer_norm_epsilon=1e-2),
    "vocabulary_11": TinyConfig(vocab_size=11),
}
"""Each differs in one respect; together they cover every one that the export must handle."""


def make_checkpoint(folder: Path, config: TinyConfig, seed: int = 0) -> Path:
    """Save a random `GPTNeoForCausalLM`; returns `folder`.

    Norms and biases are noisy, so that no term can be dropped unseen, and attention scores, which
    are not scaled, have a standard deviation of about two: selective, so that a wrong mask shows.
    """
    import torch  # slow to import, and most tests of the runtime do without
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    values = GPTNeoConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=len(config.attention_layers),
        num_heads=config.num_heads,
        attention_types=[[[kind], 1] for kind in config.attention_layers],
        window_size=config.window_size,
        max_position_embeddings=config.max_position_embeddings,
        layer_norm_epsilon=config.layer_norm_epsilon,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoForCausalLM(values)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, deviation(name, parameter.shape, config), generator=generator)
            if ".ln_" in name and name.endswith("weight"):
                parameter.add_(1.0)
    model.save_pretrained(folder)
    return folder


def deviation(name: str, shape: tuple[int, ...], config: TinyConfig) -> float:
    """Standard deviation of a random parameter."""
    if len(shape) == 1:
        return 0.3
    if "wte" in name or "wpe" in name:
        return 1.0
    unit = float(shape[1]) ** -0.5
    if "q_proj" in name or "k_proj" in name:
        # A score sums head_dim products of queries and keys, each of deviation `gain`.
        gain = (2.0 / config.head_dim**0.5) ** 0.5
        return unit * gain
    return unit


class Reference:
    """transformers' GPT-Neo, `attn_implementation="eager"`, float32, one thread."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import GPTNeoForCausalLM

        torch.set_num_threads(1)
        self._torch = torch
        self.model: Any = GPTNeoForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ).eval()

    def logits(
        self,
        ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        position_ids: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Logits [B, S, V] of token ids [B, S], without a cache."""
        return self._run(self.model, ids, attention_mask, position_ids)

    def half_logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """The same in PyTorch's float16 arithmetic."""
        half = type(self.model)(self.model.config)
        half.load_state_dict(self.model.state_dict())
        half.config._attn_implementation = "eager"
        return self._run(half.half().eval(), ids, None, None)

    def parameter(self, name: str) -> NDArray[np.float32]:
        """One tensor of the checkpoint."""
        array: NDArray[np.float32] = self.model.state_dict()[name].numpy()
        return array

    def _run(
        self,
        model: Any,
        ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None,
        position_ids: NDArray[np.int64] | None,
    ) -> NDArray[np.float32]:
        torch = self._torch
        mask, positions = (
            None if array is None else torch.tensor(array)
            for array in (attention_mask, position_ids)
        )
        with torch.inference_mode():
            logits = model(
                torch.tensor(ids), attention_mask=mask, position_ids=positions, use_cache=False
            ).logits
        result: NDArray[np.float32] = logits.float().numpy()
        return result


def random_ids(config: TinyConfig, *shape: int, seed: int = 1) -> NDArray[np.int64]:
    """Token ids from the whole vocabulary."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape, dtype=np.int64)
