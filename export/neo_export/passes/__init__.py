"""Graph rewrite passes, one per file: each shows before and after, and when it must not fire.

A pass is a function that changes a model in place and returns how often it fired. Places that
tools inspect (`neo_export.gpt_neo.model.place_name`) keep their names through every pass.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

__all__ = ["Pass"]

Pass = Callable[[ir.Model], int]
