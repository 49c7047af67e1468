"""Graph rewrites, one per file: each shows its before and after, and says when it must not fire.

A pass is a function from a model to how often it fired; it changes the model in place. Places
that tools look at (`neo_export.gpt_neo.model.place_name`) keep their names through every pass.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

__all__ = ["Pass"]

Pass = Callable[[ir.Model], int]
