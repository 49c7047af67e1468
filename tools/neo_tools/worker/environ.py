"""Environment variables of a worker."""

from __future__ import annotations

import os

__all__ = ["worker_environ"]


def worker_environ(threads: int | None = None) -> dict[str, str]:
    """This process's environment variables, with libraries offline and without telemetry.

    Args:
        threads: value of OMP_NUM_THREADS; None: unchanged.
    """
    environ = dict(os.environ)
    environ.update(
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TOKENIZERS_PARALLELISM="false",
        PYTHONUNBUFFERED="1",
    )
    environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if threads is not None:
        environ["OMP_NUM_THREADS"] = str(threads)
    return environ
