"""lm-evaluation-harness as a client: over HTTP it finds what it finds of the bundle itself."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from helpers.harness_tasks import LONGEST, write_tasks
from helpers.models import DEMO
from helpers.serving import NAME

if TYPE_CHECKING:
    from pathlib import Path

    from helpers.serving import Served

NAMES = ("last_word", "which_end", "sentence")
PROGRAM = """
import json, os, sys
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
import lm_eval.models.openai_completions
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from neo_tools.evaluate.lm import NeoLM
asked = json.load(sys.stdin)

def answers(**options):
    found = simple_evaluate(
        tasks=asked["names"], task_manager=TaskManager(include_path=asked["tasks"]),
        bootstrap_iters=0, **options)
    return {
        f"{name}.{one['doc_id']}": one["resps"]
        for name, samples in found["samples"].items() for one in samples}

model = NeoLM(asked["bundle"], threads=1, show_progress=False)
here = answers(model=model)
there = answers(model="local-completions", model_args=asked["server"])
print(json.dumps([here, there]))
"""


def test_scores_and_texts_are_those_of_the_bundle(
    server: Served, mini_bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install '.[eval]'")
    write_tasks(tmp_path)
    asked = {
        "names": NAMES,
        "tasks": str(tmp_path),
        "bundle": str(mini_bundle),
        "server": {
            "model": NAME,
            "base_url": f"{server.url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(DEMO),
            "num_concurrent": 3,
            "max_length": 512,
        },
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    here, there = json.loads(done.stdout.splitlines()[-1])
    assert here.keys() == there.keys()
    assert len(here) == 12 * len(NAMES)
    scored = 0
    for name in here:
        if name.endswith(f".{LONGEST}"):
            continue  # the harness cuts it to one token less for a server
        for [ours], [theirs] in zip(here[name], there[name], strict=True):
            if isinstance(ours, str):
                assert ours == theirs
            else:
                assert theirs[0] == pytest.approx(ours[0], abs=1e-4)
                assert theirs[1] == ours[1]
                scored += 1
    assert scored == 11 + 4 * 11
