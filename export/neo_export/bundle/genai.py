"""`genai_config.json`: what onnxruntime-genai needs to know to run the bundle.

The library's parser is in its `src/config.cpp`: an unknown key is an error, a missing key has the
default in `src/config.h`. The choices, and their reasons:

`model.type` is "decoder", its model class for any decoder-only graph with separate past tensors
for keys and values. ("gpt2" needs both stacked in one tensor. "decoder-pipeline" with prefill and
decode as two sessions works, too, but holds the prepacked weights twice and cannot rewind.)

`decoder.filename` is prefill.onnx, for the prompt and for every step: it takes a past and any
number of new tokens, and returns logits [B, 1, V]. The library recognizes that shape and uses it
as it is. From logits at every position (score.onnx) it would itself pick the last position that is
not `pad_token_id`, which is wrong for a prompt that ends in `<|endoftext|>`: that is GPT-Neo's
padding, too.

`sliding_window` is left out, because the window is inside the graph. Every layer gets a cache of
full length. The graphs accept that whether or not their local layers evict, and a generator can
then be rewound to any position.

docs/onnxruntime-genai.md describes what is possible and what is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from neo_runtime.bundle.manifest import CacheSpec, ModelSpec

__all__ = ["genai_config"]

_SEARCH_DEFAULTS: dict[str, bool | int | float] = {
    "do_sample": False,
    "early_stopping": False,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
"""Options with the same meaning in the library and in a `generation_config.json`, with the
defaults of the latter.

All are written: the library has other defaults for early_stopping (true) and top_p (0).
"""


def genai_config(
    spec: ModelSpec,
    cache: CacheSpec,
    max_length: int,
    generation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `genai_config.json` for onnxruntime-genai 0.18.

    Args:
        spec: the model.
        cache: how the bundle keeps keys and values.
        max_length: largest number of positions in a sequence, prompt and continuation together.
        generation: the checkpoint's `generation_config.json`; its values are used where the
            library has an option of the same name and meaning.
    """
    generation = generation or {}
    eos, pad = _eos_and_pad(spec, generation)
    model: dict[str, Any] = {
        "type": "decoder",
        "eos_token_id": eos,
        "pad_token_id": pad,
        "vocab_size": spec.vocab_size,
        # The library refuses a larger max_length of a generator: the position table ends here.
        "context_length": max_length,
        "decoder": _decoder(spec),
    }
    if spec.bos_token_id is not None:
        model["bos_token_id"] = spec.bos_token_id
    search = {
        **_search(spec, generation),
        "max_length": max_length,
        # True: one buffer of max_length positions is bound as past and present of every step.
        # False: each step gets a past of exactly the positions so far, and its own present.
        "past_present_share_buffer": cache.layout == "in_place",
    }
    return {"model": model, "search": search}


def _decoder(spec: ModelSpec) -> dict[str, Any]:
    """The graph: its file, its sizes, and the names of its inputs and outputs."""
    return {
        "filename": "prefill.onnx",
        # No provider named: the CPU.
        "session_options": {"log_id": "neo-onnx", "provider_options": []},
        # The shape of the cache that the library allocates …
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": spec.num_heads,
        "head_size": spec.head_dim,
        # … and two values that it only stores.
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_heads,
        # These are the library's defaults; they are written because the graphs rely on the names.
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
    }


def _eos_and_pad(spec: ModelSpec, generation: Mapping[str, Any]) -> tuple[list[int], int]:
    """Tokens that end a text, and the token that fills up finished rows of a batch.

    As in `generate`, `generation_config.json` takes precedence over `config.json`, and the first
    end token is the padding if none is set. The library needs an end token, and refuses one outside
    the vocabulary (a small model may have 50256, the architecture's default). If none is left, the
    padding token is used, or else the last token of the vocabulary.
    """
    eos = _in_vocabulary(spec, _ids(generation.get("eos_token_id")) or spec.eos_token_id)
    pads = (*_ids(generation.get("pad_token_id")), *_ids(spec.pad_token_id), *eos)
    pad = (*_in_vocabulary(spec, pads), spec.vocab_size - 1)[0]
    return eos or [pad], pad


def _in_vocabulary(spec: ModelSpec, ids: Iterable[int]) -> list[int]:
    return [token for token in ids if 0 <= token < spec.vocab_size]


def _ids(value: object) -> tuple[int, ...]:
    """Token ids from a configuration's entry, which is one id, a list, or None."""
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(token for token in values if type(token) is int)


def _search(spec: ModelSpec, generation: Mapping[str, Any]) -> dict[str, bool | int | float]:
    search = {
        name: _same_kind(generation.get(name), default)
        for name, default in _SEARCH_DEFAULTS.items()
    }
    # Hugging Face clips a top_k beyond the vocabulary, the library refuses it.
    search["top_k"] = min(search["top_k"], spec.vocab_size)
    return search


def _same_kind(value: object, default: bool | int | float) -> bool | int | float:
    """`value` in the type of `default`; `default` if it is null or of another kind."""
    if type(value) is type(default):
        return value
    if type(value) is int and type(default) is float:
        return float(value)
    return default
