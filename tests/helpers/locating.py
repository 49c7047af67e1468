"""The part of `neo-diff` that locates faults by comparing places with a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_tools.diff.engine import Engine, why_not_shown
from neo_tools.diff.run import trace

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from neo_export.comparison.faults import Fault
    from neo_runtime.bundle.folder import Bundle
    from neo_tools.diff.references import Reference
    from neo_tools.diff.settings import Settings
    from numpy.typing import NDArray


def locate(
    bundle: Bundle,
    reference: Reference,
    contexts: Sequence[NDArray[np.int64]],
    settings: Settings,
) -> list[Fault]:
    """The places that deviate, in order; on the CPU unless the settings name "cuda".

    Args:
        bundle: opened.
        reference: opened.
        contexts: token ids [S] each.
        settings: how thoroughly to compare; `threads` must be set.
    """
    assert settings.threads is not None
    engine = Engine(
        backend="cuda" if settings.backend == "cuda" else "cpu",
        device=settings.device,
        threads=settings.threads,
    )
    assert why_not_shown(bundle, engine) is None
    texts = trace(bundle, contexts, settings, engine, lambda stage, done, total: None)
    errors = reference.run(texts, lambda done, total: None, bundle)
    for number, text in enumerate(texts):
        reference.add_logits(errors, text, reference.logits(number))
    return reference.faults(errors, bundle.manifest, texts)
