"""Made-up quantization steps of an int8 cache, without calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from neo_export.quantize.kv_cache import CacheSteps

if TYPE_CHECKING:
    from helpers.models import TinyConfig
    from numpy.typing import NDArray


def random_steps(config: TinyConfig, seed: int = 0) -> CacheSteps:
    """One step per channel, all different, and coarse, so that rounding has a visible effect."""
    generator = np.random.default_rng(seed)

    def some() -> tuple[NDArray[np.float32], ...]:
        size = (len(config.attention_layers), config.hidden_size)
        return tuple(generator.uniform(0.02, 0.2, size).astype(np.float32))

    return CacheSteps(key=some(), value=some())
