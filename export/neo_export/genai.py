"""`genai_config.json`: lets onnxruntime-genai run the bundle.

Its plain decoder wants one graph for prompt and continuation, with logits at every position:
that is `score.onnx`. It pads on the right of nothing (one sequence, or prompts of one length).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neo_runtime.manifest import ModelSpec

__all__ = ["genai_config"]


def genai_config(spec: ModelSpec, target: str, max_length: int) -> dict[str, Any]:
    """The configuration, as onnxruntime-genai's documentation defines it."""
    eos = list(spec.eos_token_id)
    end: int | list[int] = eos[0] if len(eos) == 1 else eos
    return {
        "model": {
            "type": "gpt2",
            "bos_token_id": spec.bos_token_id if spec.bos_token_id is not None else 0,
            "eos_token_id": end if eos else 0,
            "pad_token_id": spec.pad_token_id if spec.pad_token_id is not None else (eos or [0])[0],
            "context_length": max_length,
            "vocab_size": spec.vocab_size,
            "decoder": {
                "filename": "score.onnx",
                "session_options": {"log_id": "neo-onnx", "provider_options": []},
                "head_size": spec.head_dim,
                "hidden_size": spec.hidden_size,
                "num_attention_heads": spec.num_heads,
                "num_key_value_heads": spec.num_heads,
                "num_hidden_layers": spec.num_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": max_length,
            "num_beams": 1,
            "past_present_share_buffer": target != "portable",
        },
    }
