"""Turns off GPTQ for calibrated exports, where it takes most of the time."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from neo_export.quantize.quantizer import RoundToNearest

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def rounded_to_nearest() -> Iterator[None]:
    """Use statistics for everything but rounding: weights are rounded to nearest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "neo_export.decisions.calibrated.GptqQuantizer", lambda *_, **__: RoundToNearest()
        )
        yield
