"""Tasks of lm-evaluation-harness over the demo model's held-out text, as files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from helpers.hf_reference import heldout_texts

if TYPE_CHECKING:
    from pathlib import Path

TASKS = {
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.rsplit(' ', 1)[0]}}",
        "doc_to_target": "{{' ' + text.rsplit(' ', 1)[1]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "which_end": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{ends}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "whole": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "sentence": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{ends[0]}}",
        "generation_kwargs": {"until": [".", "\n"], "do_sample": False, "max_gen_toks": 20},
        "metric_list": [{"metric": "exact_match"}],
    },
}
LONGEST = 5
"""The document that is longer than the model."""


def write_tasks(folder: Path) -> None:
    """Write four kinds of tasks, each as a file that the harness includes."""
    texts = heldout_texts()
    documents = []
    for number in range(12):
        text = " ".join(
            (texts[number] * 9).split()[: 700 if number == LONGEST else 40 + 7 * number]
        )
        ends = [text.rsplit(" ", 1)[1], "elephant and", "yes", "no"]
        ends = [f" {end}" for end in ends]
        documents.append({"text": text.rsplit(" ", 1)[0], "ends": ends, "gold": 0})
    data = folder / "documents.jsonl"
    data.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    for name, task in TASKS.items():
        shared = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
        }
        # JSON is valid YAML.
        (folder / f"{name}.yaml").write_text(json.dumps(shared | task))
