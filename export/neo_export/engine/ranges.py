"""Lengths, batch sizes and builder options of a plan, checked against the bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neo_runtime.bundle.engine_record import EngineOptions
from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from neo_runtime.bundle.manifest import Manifest

__all__ = ["EngineRequest", "resolve_options"]

_OPT_LENGTH = 128
_LOGIT_POSITIONS = 256
_LEVELS = range(6)


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """The command's options; None for those that `resolve_options` fills in."""

    min_length: int = 1
    opt_length: int | None = None
    max_length: int | None = None
    min_batch: int = 1
    opt_batch: int | None = None
    max_batch: int | None = None
    max_logit_positions: int | None = None
    workspace_bytes: int | None = None
    optimization_level: int = 3
    version_compatible: bool = False
    stripped: bool = False
    refit: bool = False


def resolve_options(request: EngineRequest, manifest: Manifest) -> EngineOptions:
    """Fill in defaults and check the result.

    Defaults: chunks of up to all positions, optimized for 128; batch size 1; logits of up to 256
    positions per call.

    Raises:
        RequestError: an option is out of range, or contradicts another one or the bundle.
    """
    max_length = request.max_length or manifest.max_length
    max_batch = request.max_batch or max(request.opt_batch or 1, request.min_batch)
    options = EngineOptions(
        min_length=request.min_length,
        opt_length=request.opt_length or max(request.min_length, min(_OPT_LENGTH, max_length)),
        max_length=max_length,
        min_batch=request.min_batch,
        opt_batch=request.opt_batch or request.min_batch,
        max_batch=max_batch,
        max_logit_positions=request.max_logit_positions or min(_LOGIT_POSITIONS, max_length),
        workspace_bytes=request.workspace_bytes,
        optimization_level=request.optimization_level,
        version_compatible=request.version_compatible,
        stripped=request.stripped,
        refit=request.refit,
    )
    if max_length > manifest.max_length:
        raise RequestError(
            f"--max-length is {max_length}, expected at most {manifest.max_length}, the positions "
            "of the bundle's cache; lower it, or export with a larger --max-length"
        )
    _check_order("length", options.min_length, options.opt_length, max_length)
    _check_order("batch", options.min_batch, options.opt_batch, max_batch)
    if not 1 <= options.max_logit_positions <= max_length:
        raise RequestError(
            f"--max-logit-positions is {options.max_logit_positions}, expected 1 to {max_length} "
            "(--max-length)"
        )
    if options.optimization_level not in _LEVELS:
        raise RequestError(
            f"--optimization-level is {options.optimization_level}, expected 0 to {_LEVELS[-1]}"
        )
    if options.workspace_bytes is not None and options.workspace_bytes <= 0:
        raise RequestError(f"--workspace is {options.workspace_bytes} bytes, expected more than 0")
    return options


def _check_order(what: str, least: int, best: int, most: int) -> None:
    if not 1 <= least <= best <= most:
        raise RequestError(
            f"--min-{what} {least}, --opt-{what} {best} and --max-{what} {most} contradict each "
            "other; expected 1 ≤ min ≤ opt ≤ max"
        )
