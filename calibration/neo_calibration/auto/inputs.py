"""The inputs of a search, and their checks before any long work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from neo_export.command.search_options import check_divergence, check_report_folder, parse_size
from neo_export.gpt_neo.parameters import expected_shapes
from neo_export.quantize.int4 import BLOCK_SIZES, largest_block_size
from neo_export.quantize.plan import Storage, WeightPlan, check_patterns
from neo_runtime.errors import RequestError

from neo_calibration.auto.search import rest_of
from neo_calibration.text import read_text

if TYPE_CHECKING:
    from pathlib import Path

    from neo_export.checkpoint.whole import Checkpoint
    from neo_runtime.bundle.manifest import ModelSpec
    from numpy.typing import NDArray

__all__ = ["SearchInputs", "TextParts", "candidate_storages"]


@dataclass(frozen=True)
class TextParts:
    """Two parts of a text, in whole contexts."""

    search: NDArray[np.int64]
    """Token ids [n, S] to measure sensitivities on."""
    judge: NDArray[np.int64]
    """Token ids [n, S] to measure bundles on."""
    found: int
    """Tokens that the text has, at most `wanted`."""
    wanted: int
    """Tokens of both parts, and of the text before them that the statistics are of."""


@dataclass(frozen=True, kw_only=True)
class SearchInputs:
    """The inputs that are known before there are statistics."""

    text: tuple[Path, ...]
    base: str | None = None
    """The base model of a LoRA adapter; None for the one that the adapter names."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; None for the checkpoint's own."""
    keep: tuple[str, ...] = ()
    """Shell patterns: these matrices stay float32."""
    max_divergence: float | None = None
    """Limit of the KL divergence, nats."""
    max_size: str | None = None
    """Limit of the weight file: bytes, or a fraction below 1 of float32's size."""
    tokens: int = 4096
    """Approximate number of positions in each part of the text."""
    report: Path | None = None
    """Folder of the report."""

    def check(self) -> None:
        """Refuse an invalid limit, and a report that cannot be written.

        Raises:
            RequestError: the limit is invalid.
            OutputError: the report cannot be written.
        """
        if self.max_divergence is not None:
            check_divergence(self.max_divergence)
        if self.report is not None:
            check_report_folder(self.report)

    def check_model(self, checkpoint: Checkpoint) -> None:
        """Refuse inputs that do not fit the model, and a text that is too short.

        Raises:
            NeoError: an input is refused; the message says which.
        """
        self.limit(checkpoint.spec)
        self.parts(checkpoint)

    def limit(self, spec: ModelSpec) -> int | None:
        """The limit of the weights in bytes, or None.

        Raises:
            RequestError: `max_size` is not a size, no plan can be that small, or a pattern of
                `keep` matches nothing.
        """
        shapes = expected_shapes(spec)
        check_patterns(self.keep, shapes, "--keep-fp32")
        if self.max_size is None:
            return None
        number = parse_size(self.max_size)
        whole = sum(4 * math.prod(shape) for shape in shapes.values())
        limit = int(number if number >= 1 else number * whole)
        plans = (WeightPlan(storage).keeping(self.keep) for storage in candidate_storages(spec))
        least = min(plan.bytes_of(shapes) for plan in plans) + rest_of(shapes)
        if least > limit:
            raise RequestError(
                f"--max-size {self.max_size} allows {limit:,} bytes of weights, but the smallest "
                f"bundle has at least {least:,}; raise --max-size"
            )
        return limit

    def parts(self, checkpoint: Checkpoint, seen: int = 0) -> TextParts:
        """Split the text into two parts.

        Args:
            checkpoint: provides the tokenizer and the length of a context.
            seen: tokens of the same text that the statistics are of; the parts come after them if
                there is enough text.

        Raises:
            RequestError: the text is too short for two parts, or cannot be read.
            StatisticsError: there is no text.
        """
        length = min(checkpoint.spec.max_position_embeddings, max(1, self.tokens))
        each = max(1, self.tokens // length)
        wanted = seen + 2 * each * length
        text = read_text(self.text, checkpoint, wanted, length)
        whole = [context for context in text.contexts if len(context) == length]
        if len(whole) < 2 * each:
            raise RequestError(
                f"the text has {text.tokens} tokens, too few for two parts of {each * length} to "
                "measure on; give more text, or lower --tokens"
            )
        search, judge = np.stack(whole[-2 * each : -each]), np.stack(whole[-each:])
        return TextParts(search, judge, text.tokens, wanted)


def candidate_storages(spec: ModelSpec) -> tuple[Storage, ...]:
    """int8, and int4 with the largest possible block size and smaller ones down to 16."""
    widths = (spec.hidden_size, spec.intermediate_size)
    largest = largest_block_size(widths)
    blocks = sorted({size for size in BLOCK_SIZES if size in (16, 32)} | {largest})
    return (*(Storage("int4", size) for size in blocks if size <= largest), Storage("int8"))
