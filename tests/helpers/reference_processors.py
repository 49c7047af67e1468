"""Hugging Face's logits processors, in its order, as the reference for the runtime's rules."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationConfig, GPTNeoConfig, GPTNeoForCausalLM, LogitsProcessorList

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@functools.cache
def tiny_model(vocab_size: int = 30, seed: int = 0, scale: float = 1.0) -> GPTNeoForCausalLM:
    """A random GPT-Neo of two layers, eager, float32, with no end-of-sequence token of its own.

    Its head is untied, or it would only repeat the last token; `scale` is the weights' deviation:
    the larger it and the embeddings are, the more the next token depends on the ones before.
    """
    torch.manual_seed(seed)
    config = GPTNeoConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.5,
        attn_implementation="eager",
    )
    model = GPTNeoForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(std=scale)
    return model


def reference_processors(
    arguments: dict[str, Any], prompt_length: int, custom: Sequence[Any] = ()
) -> LogitsProcessorList:
    """What `generate(**arguments)` would apply to the logits after a prompt of that length.

    Args:
        arguments: keyword arguments of `generate`, a length limit among them.
        prompt_length: tokens of the prompt.
        custom: processors of the caller, which `generate` puts in its own place.
    """
    model = tiny_model()
    config, _ = model._prepare_generation_config(GenerationConfig(**arguments))
    model._prepare_special_tokens(config, device="cpu", batch_size=1)
    model._prepare_generated_length(
        generation_config=config,
        has_default_max_length="max_length" not in arguments,
        has_default_min_length="min_length" not in arguments,
        model_input_name="input_ids",
        input_ids_length=prompt_length,
        inputs_tensor=torch.zeros((1, prompt_length), dtype=torch.long),
    )
    return model._get_logits_processor(
        config,
        input_ids_seq_length=prompt_length,
        logits_processor=LogitsProcessorList(custom),
        device="cpu",
        model_kwargs={"attention_mask": torch.ones((1, prompt_length), dtype=torch.long)},
    )


def reference_scores(
    processors: LogitsProcessorList, ids: NDArray[np.int64], scores: NDArray[np.float32]
) -> NDArray[np.float32]:
    """float32 [V] after all processors, for one row."""
    processed = processors(torch.from_numpy(ids)[None], torch.from_numpy(scores.copy())[None])
    return np.asarray(processed[0].numpy(), dtype=np.float32)
