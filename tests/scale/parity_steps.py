"""The steps that compare numbers with PyTorch, position by position."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from neo_export.tolerances import TOLERANCES

from .figures import PRIVATE_LIMIT, Figure, cost

if TYPE_CHECKING:
    from pathlib import Path

    from .session import Session

__all__ = ["half", "parity"]

FP16_TOKENS = 600
SAMPLED_CASES = ("score", "prefill", "chunked prefill", "decode")
EVERY_STEP = "decode, every step"


def parity(session: Session) -> list[Figure]:
    done = session.bundle("fp32", "--fp32")
    cases = (*SAMPLED_CASES, EVERY_STEP) if session.settings.every_step else SAMPLED_CASES
    found = _compare(session, done.bundle, cases, None)
    reference = session.reference
    return [
        *cost(reference.measured, reference.command, of="PyTorch eager: "),
        *found,
    ]


def half(session: Session) -> list[Figure]:
    done = session.bundle("fp16", "--fp16")
    size = (done.bundle / "weights.bin").stat().st_size
    figures = [
        *cost(done.measured, done.command, private_limit=PRIVATE_LIMIT),
        Figure(name="size of the weights", value=size / 1e9, unit="GB", command=done.command),
        *_compare(session, done.bundle, SAMPLED_CASES, FP16_TOKENS),
    ]
    session.drop(done.bundle)
    return figures


def _compare(
    session: Session, bundle: Path, cases: tuple[str, ...], length: int | None
) -> list[Figure]:
    """Every case against the reference, and a figure that shows what the comparison can see."""
    reference = session.reference
    command = ["-m", "tests.scale.parity", str(bundle)]
    command += ["--ids", str(reference.ids), "--logits", str(reference.logits)]
    command += ["--length", str(length)] if length is not None else []
    command += ["--exact", str(session.exact.logits)]
    for case in cases:
        command += ["--case", case]
    result, measured, text = session.child(command, f"compare {bundle.name} with the reference")
    limit = _limit(result, reference.facts)
    figures = [figure for case in result["cases"] for figure in _case(case, limit, text)]
    figures += cost(measured, text, of="all of it: ")
    seen = Figure(
        name="PyTorch itself with a window one position too long: worst relative L2",
        value=reference.facts["wrong_window_error"],
        # Half precision is no finer than this; float32 has to tell the two apart.
        limit=10 * limit if result["precision"] == "fp32" else None,
        relation="≥",
        command=reference.command,
        note="what a wrong window would show",
    )
    figures += [*_against_exact(result["exact"], text), seen]
    if result["precision"] == "fp16":
        facts = reference.facts
        name = f"PyTorch in float16: worst relative L2 of {facts['half_tokens']} positions"
        note = f"median {facts['half_error_median']:.2g}"
        figures.append(
            Figure(name=name, value=facts["half_error"], command=reference.command, note=note)
        )
    return figures


def _limit(result: dict[str, Any], facts: dict[str, Any]) -> float:
    """The table's limit, or a multiple of PyTorch's own rounding error where that is larger."""
    tolerance = TOLERANCES[result["precision"]]
    own = {"fp32": result["exact"]["worst"]["reference"], "fp16": facts["half_error"]}
    if tolerance.of_reference is None or result["precision"] not in own:
        return tolerance.logits
    return max(tolerance.logits, tolerance.of_reference * own[result["precision"]])


def _against_exact(found: dict[str, Any], command: str) -> list[Figure]:
    """Not judged: how much of the difference to PyTorch is PyTorch's own rounding."""
    names = {"bundle": "the bundle's score", "reference": "PyTorch in float32"}
    return [
        Figure(
            name=f"{name} against float64: worst relative L2 of {found['tokens']} positions",
            value=found["worst"][key],
            command=command,
            note=f"median {found['median'][key]:.2g}",
        )
        for key, name in names.items()
    ]


def _case(case: dict[str, Any], limit: float, command: str) -> list[Figure]:
    name, compared = case["name"], case["compared"]
    return [
        Figure(
            name=f"{name}: worst relative L2 of {compared} positions",
            value=case["worst"] if math.isfinite(case["worst"]) else math.inf,
            limit=limit,
            command=command,
            note=f"at position {case['worst_position']}, last position {case['last_position']}, "
            f"median {case['median']:.2g}",
        ),
        Figure(
            name=f"{name}: positions with another best token",
            value=len(case["disagreements"]),
            limit=0,
            relation="=",
            command=command,
            note=", ".join(str(at) for at in case["disagreements"][:10]),
        ),
    ]
