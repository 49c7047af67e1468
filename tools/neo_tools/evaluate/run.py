"""One model, some tasks: what `neo-eval` asks lm-evaluation-harness for."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import lm_eval
import lm_eval.evaluator
from lm_eval.tasks import TaskManager
from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lm_eval.api.model import LM

    from neo_tools.evaluate.paired import Results

__all__ = ["evaluated", "reference_model"]


def reference_model(checkpoint: str) -> LM:
    """PyTorch's GPT-Neo, as the harness runs it; eager attention, which keeps to the window.

    Args:
        checkpoint: a folder, or a Hugging Face id.

    Raises:
        RequestError: it is no checkpoint.
    """
    from lm_eval.models.huggingface import HFLM

    try:
        return HFLM(
            pretrained=checkpoint,
            dtype="float32",
            device="cpu",
            batch_size=1,
            attn_implementation="eager",
        )
    except (OSError, ValueError) as error:
        raise RequestError(f"the reference {checkpoint} cannot be loaded: {error}") from error


def evaluated(
    model: LM,
    tasks: Sequence[str],
    *,
    include_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
) -> Results:
    """Run tasks, with every sample in the result.

    Raises:
        RequestError: there is no such task.
    """
    manager = _manager(include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        names = ", ".join(task or repr(task) for task in unknown)
        raise RequestError(
            f"there is no task {names}; `lm_eval ls tasks` lists the harness's own, and "
            "--include-path names a folder of your own"
        )
    # The harness asks git about the current folder, which says on stderr where that is none of its.
    with patch.object(lm_eval.evaluator, "get_git_commit_hash", return_value=None):
        found: dict[str, Any] | None = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
        )
    assert found is not None  # None is for the other ranks of a distributed run
    return found


@cache
def _manager(include_path: Path | None) -> TaskManager:
    """Knows all tasks; reading them takes seconds."""
    return TaskManager(include_path=None if include_path is None else str(include_path))
