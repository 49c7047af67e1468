"""The manifest of a bundle, `neo.json`: written by the exporter, read by the runtime.

`Manifest.to_json` and `Manifest.from_json` are exact inverses, and the JSON is canonical (sorted
keys), so that equal manifests have equal bytes.
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
"""Additional outputs of a graph that computes the top tokens itself: the K largest logits (float32
[batch, 1, K], descending), their token ids (int64 [batch, 1, K]), and the sum over the vocabulary
of exp(logit − largest logit) (float64 [batch, 1])."""


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
    """Rows of the position table. The bundle's limit is `Manifest.max_length`."""
    window_size: int
    """Positions that a local layer attends to, the current one included."""
    attention_layers: tuple[str, ...]
    """"global" or "local" for each layer."""
    layer_norm_epsilon: float
    activation_function: str
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    pad_token_id: int | None

    @property
    def separator(self) -> tuple[int, ...]:
        """The token between two documents: the first end-of-sequence id within the vocabulary.

        Returns:
            One token id, or () if there is none: small models often keep GPT-2's id 50256 in their
            configuration, although their vocabulary is smaller.
        """
        return tuple(token for token in self.eos_token_id if 0 <= token < self.vocab_size)[:1]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str
    dtype: str
    """A numpy name: "float32", "float16", "int64", …"""
    shape: tuple[int | str, ...]
    """Sizes; a string is the name of a dynamic dimension."""


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One ONNX graph of the bundle."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The KV cache: two tensors [batch, num_heads, length, head_dim] per layer."""

    layout: Literal["in_place", "append", "static"]
    """`in_place`: one buffer, of any length ≥ the positions in use, is bound as past and present.
    `static`: the same with a length of exactly `Manifest.max_length`, initialized to finite values.
    `append`: present is past followed by the new positions, a new and longer tensor in each call.
    """
    padding: Literal["right", "left"]
    """The side on which prompts of different lengths are padded: see docs/bundle.md."""
    dtype: str
    """Element type of keys and values, a numpy name or "bfloat16"."""
    window: int | None = None
    """Positions that a local layer's buffers must have room for at least; the graphs evict older
    ones. None: the buffers of all layers hold the whole sequence."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """An inner value, present in all graphs, that tools can inspect.

    It is the ONNX value named `value`; where a fused operator computes it internally (node metadata
    `neo.sum`), it is the sum of that operator's first input and its bias.
    """

    layer: int | None
    """None for the embedding and the final norm."""
    place: str
    """One of `embedding`, `query`, `key`, `value`, `attended`, `attention`, `mlp`, `residual`,
    `final_norm`."""
    value: str
    """Name of the ONNX value, [batch, sequence, width]."""
    channels: tuple[int, int] | None = None
    """First and one-past-last index in the last dimension, for packed query, key and value; None
    for the whole dimension."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and sha256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the bundle was made from, identified by content, not by paths or names."""

    checkpoint: str
    """sha256 (hex) over names, types, shapes and bytes of all tensors, after merging adapters."""
    calibration_text: str | None
    """sha256 (hex) of the token ids used for calibration; None without calibration."""
    decode_weights: dict[str, int]
    """Number of matrices by storage format in the decode graph: {"int4:64": 97, "fp32": 1}."""
    prefill_weights: dict[str, int]
    """The same for the prefill and score graphs."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that a runtime must know before it opens a graph."""

    precision: str
    """Storage format of the weights: "fp32", "fp16", "bf16", "int8", "int4", "fp8", or "mixed"."""
    target: str
    """What the graphs' operators are chosen for: "cpu", "cuda", "portable" or "tensorrt"."""
    max_length: int
    """Most positions of a sequence, prompt and continuation together."""
    model: ModelSpec
    cache: CacheSpec
    graphs: dict[str, GraphSpec]
    """By name: "prefill", "decode", "score". With a static cache there is no "score": "prefill" has
    an input `logit_positions` and also scores."""
    probes: tuple[Probe, ...]
    files: dict[str, FileRecord]
    """All files of the bundle except `neo.json`, by their paths in the folder, with `/`."""
    has_tokenizer: bool
    minimum_onnxruntime: str
    """The oldest onnxruntime that computes these graphs correctly."""
    tools: dict[str, str]
    """Versions of the packages that wrote the bundle."""
    source: Source | None = None
    """None for bundles of older exporters."""
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_json(self) -> str:
        """Canonical JSON text, including its own checksum, with a final newline."""
        raw = asdict(self)
        return _canonical(raw | {"checksum": _checksum(raw)}) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = MANIFEST_NAME) -> Manifest:
        """Parse and validate a manifest.

        Args:
            text: contents of a `neo.json`.
            source: name of the file, for errors.

        Raises:
            BundleDamagedError: the text is not JSON, a field is missing, unknown or of the wrong
                type, or the checksum does not match.
            BundleUnsupportedError: the schema is newer than this runtime knows.
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
                f"{source} has schema version {version}, but this neo_runtime reads up to "
                f"{SCHEMA_VERSION}; upgrade neo-onnx, or export the bundle with this version"
            )
        checksum = raw.pop("checksum", None)
        try:
            manifest: Manifest = parse_strictly(cls, {"source": None} | raw, source)
        except BundleDamagedError as error:
            raise BundleDamagedError(f"{error}; export the bundle again") from error
        try:
            expected = _checksum(raw)
        except UnicodeEncodeError as error:
            raise BundleDamagedError(
                f"{source} contains an unpaired surrogate, which is not valid text; export the "
                "bundle again"
            ) from error
        if checksum != expected:
            raise BundleDamagedError(
                f"{source} was altered after it was written: its checksum is {checksum!r}, "
                f"expected {expected!r}; copy or export the bundle again"
            )
        return manifest

    @property
    def needs_gpu(self) -> bool:
        """Whether the CPU cannot run the bundle: it needs a TensorRT plan, or is in bfloat16."""
        return self.cache.layout == "static" or self.cache.dtype == "bfloat16"

    @property
    def digest(self) -> str:
        """sha256 (hex) over the names and checksums of all files; identifies the bundle."""
        lines = "".join(f"{name} {record.sha256}\n" for name, record in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def _canonical(raw: dict[str, Any]) -> str:
    return json.dumps(raw, indent=1, sort_keys=True, ensure_ascii=False)


def _checksum(raw: dict[str, Any]) -> str:
    """sha256 (hex) of the canonical text without the checksum; detects damage to values."""
    return hashlib.sha256(_canonical(raw).encode()).hexdigest()
