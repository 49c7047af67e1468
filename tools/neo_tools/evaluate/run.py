"""A run of lm-evaluation-harness: one model, some tasks."""

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
    """A checkpoint in PyTorch float32 on the CPU, as a model of the harness.

    Attention is eager, which applies the window of local layers correctly.

    Args:
        checkpoint: a folder, or a Hugging Face id.

    Raises:
        RequestError: it cannot be loaded.
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
    """Run tasks; the results include every sample.

    Args:
        model: the model.
        tasks: names of tasks.
        include_path: a folder with further tasks, as YAML.
        num_fewshot: examples before each question; None: set by each task.
        limit: use only so many first samples of each task; None: all.

    Raises:
        RequestError: a task does not exist.
    """
    manager = _manager(include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        names = ", ".join(task or repr(task) for task in unknown)
        raise RequestError(
            f"there is no task {names}; `lm_eval ls tasks` lists the harness's own, and "
            "--include-path names a folder of your own"
        )
    # The harness calls git, which writes to stderr if the current folder is not a repository.
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
    assert found is not None  # it is None only on other ranks of a distributed run
    return found


@cache
def _manager(include_path: Path | None) -> TaskManager:
    """The index of all tasks; cached, because reading them takes seconds."""
    return TaskManager(include_path=None if include_path is None else str(include_path))
