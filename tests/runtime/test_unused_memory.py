"""Freed memory goes back to the system after what takes much of it."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import neo_runtime
import numpy as np
import pytest
from neo_runtime.backends import unused_memory


def private_bytes() -> int:
    """Anonymous resident memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_nothing_is_left_to_give_back_after_a_prompt(mini_bundle: Path) -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        pytest.skip("the C library has no malloc_trim")
    ids = np.arange(500)
    with neo_runtime.load(mini_bundle, threads=1) as model, model.new_cache(1, 512) as cache:
        for compute in (lambda: model.prefill(cache, [ids]), lambda: model.logits(ids)):
            result = compute()
            before = private_bytes()
            trim(0)
            assert before - private_bytes() < 1 << 20
            del result


def test_a_c_library_without_it(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unused_memory, "_malloc_trim", lambda: None)
    with neo_runtime.load(mini_bundle, threads=1) as model:
        assert np.isfinite(model.logits(np.arange(9))).all()
