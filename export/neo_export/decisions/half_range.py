"""Finds what float16 cannot hold, from a checkpoint and its statistics: it stays float32.

float16 ends at 65504 and has 11 bits of precision down to 2⁻¹⁴, fewer below. The checks cover every
weight; the largest value of every place, with a margin (other texts may reach more than the
calibration text); how small norms, gelu and the residual stream are (not queries, keys and values,
which are float16 in any case); sums before their bias; and unscaled attention scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from neo_runtime.errors import StatisticsError

from neo_export.gpt_neo.parameters import (
    EMBEDDING,
    LAYER_MATRICES,
    POSITIONS,
    head_name,
    readers_of,
)
from neo_export.passes._wide import MIDDLE_PLACE, Wide

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_runtime.bundle.manifest import ModelSpec
    from numpy.typing import NDArray

    from neo_export.statistics.folder import Statistics

__all__ = ["LARGEST", "MARGIN", "HalfRange", "WideTensor", "find_half_range"]

LARGEST = 65504.0
"""The largest float16."""
MARGIN = 4.0
"""A place must stay below `LARGEST` by this factor on the calibration text."""
_LEAST = 2.0**-14 / np.sqrt(12)
"""Below this root mean square, most values of a place have a relative rounding error above 2⁻¹¹:
the spacing of such small float16 numbers is fixed at 2⁻²⁴."""
_WEIGHT_ERROR = 2.0**-10
"""Largest ‖w − half(w)‖ / ‖w‖ of a row. Rounding to 11 bits gives about 2⁻¹²."""
_SLAB = 1 << 22


@dataclass(frozen=True)
class WideTensor:
    """A weight or place that stays float32, and why."""

    name: str
    """Name of the weight in the checkpoint, or of the place."""
    reason: str


@dataclass(frozen=True)
class HalfRange:
    """What a float16 bundle keeps in float32, and why."""

    wide: Wide = field(default_factory=Wide)
    tensors: tuple[WideTensor, ...] = ()
    scores: float = 0.0
    """The largest |q·k| if it exceeds the margin: products with float16 results may overflow. 0.0
    if all are small."""


class _Findings:
    def __init__(self) -> None:
        self.places: set[str] = set()
        self.weights: set[str] = set()
        self.tensors: list[WideTensor] = []

    def add(self, name: str, reason: str, *, places: tuple[str, ...] = ()) -> None:
        """Record a weight or place; its product and the given places stay float32."""
        self.tensors.append(WideTensor(name, reason))
        self.places.update(places)

    def product(self, weight: str) -> None:
        """Keep a matrix, or the vector of a norm, in float32, with its bias."""
        owner = weight.rpartition(".")[0]
        self.weights.update((f"{owner}.weight", f"{owner}.bias"))


def find_half_range(
    read: Callable[[str], NDArray[np.float32]],
    names: tuple[str, ...],
    spec: ModelSpec,
    statistics: Statistics,
    progress: Callable[[int, int], None] | None = None,
) -> HalfRange:
    """Decide what stays float32.

    Args:
        read: returns a weight of the checkpoint by name.
        names: names of all weights.
        spec: the architecture.
        statistics: those of this checkpoint.
        progress: called with the number of weights done and the total.

    Raises:
        StatisticsError: queries, keys or values do not fit; as the cache is float16, no change of
            the graph helps.
    """
    found = _Findings()
    for done, name in enumerate(names, start=1):
        reason = _weight_reason(read(name))
        if reason is not None:
            found.add(name, reason)
            found.product(name)
        if progress is not None:
            progress(done, len(names))
    for layer in range(spec.num_layers):
        _of_layer(found, f"transformer.h.{layer}", layer, statistics, read)
    for place in ("embedding", "final_norm", "logits"):
        _of_model(found, place, statistics, spec)
    scores = max((max(statistics.score_max(i)) for i in range(spec.num_layers)), default=0.0)
    return HalfRange(
        Wide(frozenset(found.places), frozenset(found.weights)),
        tuple(found.tensors),
        scores if scores > LARGEST / MARGIN else 0.0,
    )


def _weight_reason(values: NDArray[np.float32]) -> str | None:
    largest = max(float(values.max()), -float(values.min())) if values.size else 0.0
    if largest >= LARGEST + 16:
        return f"holds ±{largest:.4g}, float16 ends at {LARGEST:.0f}"
    rows = values.reshape(-1, values.shape[-1])
    step = max(1, _SLAB // max(rows.shape[1], 1))
    worst = 0.0
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        lost = np.linalg.norm(some - some.astype(np.float16).astype(np.float32), axis=1)
        size = np.linalg.norm(some, axis=1)
        worst = max(worst, float((lost / np.maximum(size, 1e-37)).max()))
    if worst > _WEIGHT_ERROR:
        return (
            f"is so small that float16 loses {worst:.2g} of a row "
            f"(2⁻¹⁰ is allowed; below 2⁻¹⁴ it has fewer bits)"
        )
    return None


def _of_layer(
    found: _Findings,
    prefix: str,
    layer: int,
    statistics: Statistics,
    read: Callable[[str], NDArray[np.float32]],
) -> None:
    for kind in ("query", "key", "value"):
        if (reason := _large(statistics, f"{prefix}.{kind}")) is not None:
            raise StatisticsError(
                f"{prefix}.{kind} {reason}: keys and values are cached in float16, and "
                "queries are multiplied with them; export without statistics, with --bf16 for a "
                "GPU or with --target cpu --fp32"
            )
    for norm in ("ln_1", "ln_2"):
        if (reason := _unfit(statistics, f"{prefix}.{norm}")) is not None:
            found.add(f"{prefix}.{norm}", reason)
            for name in (f"{prefix}.{norm}.weight", *readers_of(f"{prefix}.{norm}")):
                found.product(name)
    if (reason := _unfit(statistics, f"{prefix}.gelu")) is not None:
        found.add(f"{prefix}.gelu", reason)
        found.product(f"{prefix}.mlp.c_fc.weight")
        found.product(f"{prefix}.mlp.c_proj.weight")
    for matrix in LAYER_MATRICES:
        if not matrix.has_bias:
            continue
        name, weight = f"{prefix}.{matrix.gives}", f"{prefix}.{matrix.weight}"
        reason = _large(statistics, name)
        if reason is not None:
            # The output of c_fc has no stable name in the graph.
            found.add(name, reason, places=() if matrix.gives == "c_fc" else (name,))
        else:
            bias = read(f"{prefix}.{matrix.module}.bias")
            reason = _large_before_bias(statistics, name, bias)
            if reason is not None:
                found.add(name, reason)
        if reason is not None:
            found.product(weight)
    _of_residual(found, prefix, layer, statistics)


def _of_residual(found: _Findings, prefix: str, layer: int, statistics: Statistics) -> None:
    before = f"transformer.h.{layer - 1}.residual" if layer else "transformer.embedding"
    if (reason := _unfit(statistics, f"{prefix}.residual")) is not None:
        found.add(f"{prefix}.residual", reason, places=(f"{prefix}.residual",))
    # The sum between attention and MLP is not a place; the sum of its addends' maxima bounds it.
    bound = sum(statistics.places[name].largest for name in (before, f"{prefix}.attention"))
    if (reason := _past_margin(bound, "may reach")) is not None:
        found.add(f"{prefix}.{MIDDLE_PLACE}", reason, places=(f"{prefix}.{MIDDLE_PLACE}",))


def _of_model(found: _Findings, place: str, statistics: Statistics, spec: ModelSpec) -> None:
    name = f"transformer.{place}"
    reason = _large(statistics, name) if place == "logits" else _unfit(statistics, name)
    if reason is None:
        return
    found.add(name, reason, places=(name,))
    if place == "embedding":
        found.weights.update((EMBEDDING, POSITIONS))
    if place in ("final_norm", "logits"):
        found.product(head_name(tied=spec.tie_word_embeddings))
    if place == "final_norm":
        found.product("transformer.ln_f.weight")


def _unfit(statistics: Statistics, place: str) -> str | None:
    return _large(statistics, place) or _small(statistics, place)


def _large(statistics: Statistics, place: str) -> str | None:
    return _past_margin(statistics.places[place].largest)


def _large_before_bias(statistics: Statistics, place: str, bias: NDArray[np.float32]) -> str | None:
    low, high = statistics.channel_range(place)
    largest = float(np.maximum(bias - low, high - bias).max())
    return _past_margin(largest, when=" before its bias is added")


def _past_margin(largest: float, verb: str = "reaches", when: str = "") -> str | None:
    if largest <= LARGEST / MARGIN:
        return None
    return f"{verb} ±{largest:.4g}{when} (float16 ends at {LARGEST:.0f}; margin {MARGIN:g})"


def _small(statistics: Statistics, place: str) -> str | None:
    size = float(np.sqrt(statistics.places[place].mean_square))
    if size >= _LEAST:
        return None
    return f"is {size:.2g} (root mean square), where float16 has fewer than 11 bits"
