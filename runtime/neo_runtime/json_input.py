"""JSON that somebody gave."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["parse_json"]


def parse_json(text: str | bytes | bytearray, **options: Any) -> Any:
    """As `json.loads`, with one kind of error.

    Raises:
        ValueError: it is not JSON, in no encoding of Unicode, or nested too deeply.
    """
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
