"""The bundle's schema: `neo.json`, written by the exporter, read by the runtime.

One dataclass a concept; `Manifest.to_json` and `Manifest.from_json` are exact inverses, and
the JSON is canonical (sorted keys), so that the same bundle always has the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from neo_runtime.bundle.strict_json import parse_object, parse_strictly
from neo_runtime.errors import BundleDamagedError, BundleUnsupportedError

__all__ = [
    "CANDIDATE_OUTPUTS",
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "WEIGHTS_NAME",
    "CacheSpec",
    "FileRecord",
    "GraphSpec",
    "Manifest",
    "ModelSpec",
    "Probe",
    "Source",
    "TensorSpec",
    "is_quantized",
]

MANIFEST_NAME = "neo.json"
WEIGHTS_NAME = "weights.bin"
SCHEMA_VERSION = 1
CANDIDATE_OUTPUTS = ("top_values", "top_ids", "exp_sum")
"""Outputs beside `logits` where a graph finds the best tokens itself: the largest logits (float32
[batch, 1, K], descending), their token ids (int64 [batch, 1, K]), and the sum over the
vocabulary of exp(logit - largest logit) (float64 [batch, 1])."""


def is_quantized(precision: str) -> bool:
    """Whether a bundle of this precision stores matrices in 8 bits or fewer.

    "fp8" is float8 E4M3; "mixed" is int8, int4 and unquantized matrices side by side.
    """
    return precision in ("int8", "int4", "fp8", "mixed")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The architecture, as the checkpoint's `config.json` gives it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    max_position_embeddings: int
    """Rows of the position table. The bundle's own limit is `Manifest.max_length`."""
    window_size: int
    """A local layer attends to this many last positions, the current one included."""
    attention_layers: tuple[str, ...]
    """"global" or "local", one per layer."""
    layer_norm_epsilon: float
    activation_function: str
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    pad_token_id: int | None

    @property
    def separator(self) -> tuple[int, ...]:
        """What stands between two documents: the first end-of-sequence id that the vocabulary has.

        Small models often carry GPT-2's 50256, and have no such token.
        """
        return tuple(token for token in self.eos_token_id if 0 <= token < self.vocab_size)[:1]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph; a string in `shape` names a dynamic dimension."""

    name: str
    dtype: str
    """A numpy name: "float32", "float16", "int64", …"""
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One ONNX graph of the bundle."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Keys and values: two tensors [batch, num_heads, length, head_dim] a layer."""

    layout: Literal["in_place", "append", "static"]
    """`in_place`: bind one buffer of any length ≥ the positions in use as past and as present.
    `static`: the same with a length of exactly `Manifest.max_length`, finite at first (zeros).
    `append`: present = past followed by the new positions (a new, longer tensor each call)."""
    padding: Literal["right", "left"]
    """On which side a ragged batch of prompts is padded: see docs/bundle.md."""
    dtype: str
    """Element type of keys and values, a numpy name."""
    window: int | None = None
    """Positions that a local layer's buffers must hold at least, the graphs evict older ones;
    None: every layer's buffers hold the whole sequence."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A place inside every graph that tools look at.

    The value of this name, or, where a fused operator adds it up (node metadata `neo.sum`), the sum
    of that operator's first input and its bias.
    """

    layer: int | None
    """None for the embedding and the final norm."""
    place: str
    """One of `embedding`, `query`, `key`, `value`, `attended`, `attention`, `mlp`, `residual`,
    `final_norm`."""
    value: str
    """Name of the ONNX value, [batch, sequence, width]."""
    channels: tuple[int, int] | None = None
    """First and one-past-last channel of the value's last dimension (packed q, k and v)."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and sha256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the bundle was made from, by content: wherever it lay, and whatever it was called."""

    checkpoint: str
    """sha256 (hex) over names, types, shapes and bytes of all tensors, an adapter's merged."""
    calibration_text: str | None
    """sha256 (hex) of the token ids that its statistics are of; None without statistics."""
    decode_weights: dict[str, int]
    """Matrices by how decode reads them: {"int4:64": 97, "fp32": 1}."""
    prefill_weights: dict[str, int]
    """The same of prompts and scores."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a runtime must know before it opens a graph."""

    precision: str
    """How weights are stored: "fp32", "fp16", "bf16", "int8", "int4", "fp8", or "mixed" (not all
    alike)."""
    target: str
    """Which operators the graphs use: "cpu", "cuda", "portable" or "tensorrt"."""
    max_length: int
    """Positions that a sequence may have: prompt and continuation together."""
    model: ModelSpec
    cache: CacheSpec
    graphs: dict[str, GraphSpec]
    """By name: "prefill", "decode", "score"; a static cache has no "score", its prefill takes
    `logit_positions`."""
    probes: tuple[Probe, ...]
    files: dict[str, FileRecord]
    """Every file of the bundle but `neo.json`, by its path relative to the folder, with `/`."""
    has_tokenizer: bool
    minimum_onnxruntime: str
    """The oldest onnxruntime that computes these graphs correctly."""
    tools: dict[str, str]
    """Versions of the packages that wrote the bundle."""
    source: Source | None = None
    """None: by an older exporter."""
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_json(self) -> str:
        """Canonical JSON text with its own checksum inside, and a newline at its end."""
        raw = asdict(self)
        return _canonical(raw | {"checksum": _checksum(raw)}) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = MANIFEST_NAME) -> Manifest:
        """Parse and validate.

        Args:
            text: contents of a `neo.json`.
            source: what to call it in errors.

        Raises:
            BundleDamagedError: not JSON, or a field is missing or of the wrong type.
            BundleUnsupportedError: a schema newer than this runtime knows.
        """
        raw = parse_object(text, source)
        version = raw.get("schema_version")
        if not isinstance(version, int):
            raise BundleDamagedError(
                f"{source}: schema_version is {version!r}, expected a number; "
                "is this folder a bundle written by neo-export?"
            )
        if version > SCHEMA_VERSION:
            raise BundleUnsupportedError(
                f"{source} has schema version {version}, this neo_runtime reads up to "
                f"{SCHEMA_VERSION}; upgrade neo-onnx or export the bundle with this version"
            )
        checksum = raw.pop("checksum", None)
        manifest: Manifest = parse_strictly(cls, {"source": None} | raw, source)
        try:
            expected = _checksum(raw)
        except UnicodeEncodeError as error:  # which can be no file's name either
            raise BundleDamagedError(
                f"{source} holds half of a character (an unpaired surrogate); export the bundle "
                "again"
            ) from error
        if checksum != expected:
            raise BundleDamagedError(
                f"{source} was altered after it was written: its checksum is {checksum!r}, "
                f"expected {expected!r}; copy or export the bundle again"
            )
        return manifest

    @property
    def needs_gpu(self) -> bool:
        """Whether no CPU engine runs the bundle: it needs a plan, or is in bfloat16."""
        return self.cache.layout == "static" or self.cache.dtype == "bfloat16"

    @property
    def digest(self) -> str:
        """sha256 (hex) over the names and checksums of all files: what the bundle *is*."""
        lines = "".join(f"{name} {record.sha256}\n" for name, record in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def _canonical(raw: dict[str, Any]) -> str:
    return json.dumps(raw, indent=1, sort_keys=True, ensure_ascii=False)


def _checksum(raw: dict[str, Any]) -> str:
    """sha256 (hex) of the canonical text without the checksum: a flipped bit is not a setting."""
    return hashlib.sha256(_canonical(raw).encode()).hexdigest()
