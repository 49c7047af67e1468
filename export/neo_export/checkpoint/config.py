"""`config.json` of a Hugging Face GPT-Neo checkpoint → `ModelSpec`.

Missing keys take the defaults of transformers' `GPTNeoConfig`, so a configuration has the same
meaning here. Unsupported settings that would change the result are an error.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from neo_runtime.bundle.manifest import ModelSpec
from neo_runtime.errors import CheckpointError
from neo_runtime.json_input import parse_json

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CONFIG_NAME", "GELU_TANH_NAMES", "parse_config", "read_config", "read_json_object"]

CONFIG_NAME = "config.json"

GELU_TANH_NAMES = frozenset(
    {"gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"}
)
"""transformers' five names of one function, 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))."""

_DEFAULT_ATTENTION_TYPES = [[["global", "local"], 12]]
# GPTNeoConfig.attribute_map: the file may use either name.
_ALIASES = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
_NO_DEFAULT = object()


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold one object.

    Raises:
        CheckpointError: the file cannot be read, is not UTF-8 JSON, or holds something else.
    """
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); is the download complete?"
        ) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a JSON {type(raw).__name__}, expected an object")
    return raw


def read_config(folder: Path) -> ModelSpec:
    """Read the architecture of the checkpoint in `folder`.

    Raises:
        CheckpointError: there is no configuration, it is of another architecture or of a quantized
            model, or GPT-Neo cannot have one of its values.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG_NAME}; expected a Hugging Face model folder with "
            f"{CONFIG_NAME} and weights (model.safetensors or pytorch_model.bin)"
        )
    return parse_config(read_json_object(path), str(path))


def parse_config(raw: dict[str, Any], source: str = CONFIG_NAME) -> ModelSpec:
    """Validate the contents of a `config.json`.

    The activation is returned as "gelu_new" whichever of its names (`GELU_TANH_NAMES`) the file
    uses. `attention_layers` is used if present, otherwise `attention_types` is expanded.

    Args:
        raw: the parsed JSON.
        source: how errors refer to the file.

    Raises:
        CheckpointError: see `read_config`.
    """
    if raw.get("model_type") != "gpt_neo":
        raise CheckpointError(
            f"{source}: model_type is {raw.get('model_type')!r}, expected 'gpt_neo'; "
            "only GPT-Neo checkpoints can be exported"
        )
    if raw.get("quantization_config") is not None:
        raise CheckpointError(
            f"{source}: quantization_config is present, the weights are already quantized; "
            "export the original float32, float16 or bfloat16 checkpoint instead"
        )
    values = _Values(_without_aliases(raw, source), source)
    hidden_size = values.integer("hidden_size", 2048)
    num_heads = values.integer("num_heads", 16)
    if hidden_size % num_heads:
        raise values.error(
            "hidden_size", hidden_size, f"a multiple of num_heads, which is {num_heads}"
        )
    num_layers = values.integer("num_layers", 24)
    intermediate_size = values.optional_integer("intermediate_size", None, minimum=1)
    positions = values.integer("max_position_embeddings", 2048)
    window = values.integer("window_size", 256)
    kinds = _attention_layers(values, num_layers)
    if window >= positions:  # the window never ends: such a layer is global
        kinds = ("global",) * num_layers
    return ModelSpec(
        vocab_size=values.integer("vocab_size", 50257),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size if intermediate_size is None else intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=positions,
        window_size=window,
        attention_layers=kinds,
        layer_norm_epsilon=values.positive("layer_norm_epsilon", 1e-5),
        activation_function=_activation(values),
        tie_word_embeddings=values.boolean("tie_word_embeddings", True),
        bos_token_id=values.optional_integer("bos_token_id", 50256),
        eos_token_id=values.token_ids("eos_token_id", 50256),
        pad_token_id=values.optional_integer("pad_token_id", None),
    )


class _Values:
    """Typed access to the keys of one JSON object."""

    def __init__(self, raw: dict[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source

    def error(self, key: str, found: object, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {key} is {found!r}, expected {expected}")

    def integer(self, key: str, default: int) -> int:
        value = self.raw.get(key, default)
        if type(value) is not int or value < 1:
            raise self.error(key, value, "a whole number of at least 1")
        return value

    def optional_integer(
        self, key: str, default: int | None, minimum: int | None = None
    ) -> int | None:
        value = self.raw.get(key, default)
        if value is None:
            return None
        if type(value) is not int or (minimum is not None and value < minimum):
            at_least = "" if minimum is None else f" of at least {minimum}"
            raise self.error(key, value, f"a whole number{at_least} or null")
        return value

    def token_ids(self, key: str, default: int) -> tuple[int, ...]:
        value = self.raw.get(key, default)
        items = () if value is None else value if isinstance(value, list) else (value,)
        if any(type(item) is not int for item in items):
            raise self.error(key, value, "a token id, a list of token ids or null")
        return tuple(items)

    def positive(self, key: str, default: float) -> float:
        value = self.raw.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(key, value, "a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value


def _without_aliases(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """Rename each key of `_ALIASES` to the name that `GPTNeoConfig` stores."""
    plain = dict(raw)
    for alias, name in _ALIASES.items():
        value = plain.pop(alias, _NO_DEFAULT)
        if value is _NO_DEFAULT:
            continue
        if plain.setdefault(name, value) != value:
            raise CheckpointError(
                f"{source}: {alias} is {value!r} and {name} is {plain[name]!r}; they are two "
                "names of one value, expected the same"
            )
    return plain


def _attention_layers(values: _Values, num_layers: int) -> tuple[str, ...]:
    layers = values.raw.get("attention_layers")
    key = "attention_layers"
    if layers is None:
        key = "attention_types"
        layers = _expand_attention_types(values)
    if not isinstance(layers, list) or any(kind not in ("global", "local") for kind in layers):
        raise values.error(key, values.raw.get(key), "only 'global' and 'local', one per layer")
    if len(layers) != num_layers:
        raise CheckpointError(
            f"{values.source}: {key} describes {len(layers)} layers and num_layers is "
            f"{num_layers}; expected the same number"
        )
    return tuple(layers)


def _expand_attention_types(values: _Values) -> list[Any]:
    """[[["global", "local"], 2]] → ["global", "local", "global", "local"]."""
    key = "attention_types"
    types = values.raw.get(key)
    types = _DEFAULT_ATTENTION_TYPES if types is None else types
    expected = "a list of [[kind, …], repetitions], such as [[['global', 'local'], 12]]"
    if not isinstance(types, list):
        raise values.error(key, types, expected)
    layers: list[Any] = []
    for item in types:
        if not (
            isinstance(item, list)
            and len(item) == 2
            and isinstance(item[0], list)
            and type(item[1]) is int
        ):
            raise values.error(key, types, expected)
        if len(item[0]) * item[1] > 100_000:  # an absurd count would exhaust memory
            raise values.error(key, types, "a sane number of layers")
        layers.extend(item[0] * item[1])
    return layers


def _activation(values: _Values) -> str:
    name = values.raw.get("activation_function", "gelu_new")
    if not isinstance(name, str) or name not in GELU_TANH_NAMES:
        raise values.error(
            "activation_function",
            name,
            f"'gelu_new' (or a name of the same function: {', '.join(sorted(GELU_TANH_NAMES))})",
        )
    return "gelu_new"
