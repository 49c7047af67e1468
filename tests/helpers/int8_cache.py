"""Statistics for an int8 cache, and PyTorch with keys and values rounded as in that cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neo_calibration.collect import collect
from neo_calibration.text import CalibrationText
from neo_export.checkpoint.folder import open_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from helpers.models import Reference
    from numpy.typing import NDArray

HEADROOM = 1.5


def calibrated(checkpoint: Path, ids: NDArray[np.int64], folder: Path) -> Path:
    """Statistics of a checkpoint over token ids [contexts, S]; returns `folder`."""
    text = CalibrationText(contexts=tuple(ids), max_length=ids.shape[1], files={}, warnings=())
    with open_checkpoint(checkpoint) as opened:
        collect(opened, text, folder)
    return folder


def cache_steps(reference: Reference, ids: NDArray[np.int64]) -> list[Any]:
    """Quantization step of each channel of every layer's keys and values, computed in PyTorch.

    Args:
        reference: the checkpoint.
        ids: [contexts, S], the calibration text.
    """
    largest: list[Any] = []
    handles = [
        projection.register_forward_hook(
            lambda _m, _i, output: largest.append(output.abs().amax(dim=(0, 1)))
        )
        for projection in _projections(reference)
    ]
    reference.logits(ids)
    for handle in handles:
        handle.remove()
    return [range_ * (HEADROOM / 127) for range_ in largest]


def round_cache(reference: Reference, steps: list[Any]) -> None:
    """Round the keys and values of `reference` to int8, with PyTorch's rounding."""
    import torch

    def rounded(step: Any) -> Any:
        zeros = torch.zeros(len(step), dtype=torch.int32)
        return lambda _m, _i, output: torch.fake_quantize_per_channel_affine(
            output, step, zeros, output.dim() - 1, -128, 127
        )

    for projection, step in zip(_projections(reference), steps, strict=True):
        projection.register_forward_hook(rounded(step))


def _projections(reference: Reference) -> list[Any]:
    """Of keys and values, layer by layer."""
    return [
        projection
        for block in reference.model.transformer.h
        for projection in (block.attn.attention.k_proj, block.attn.attention.v_proj)
    ]
