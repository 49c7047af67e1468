"""Worker for `portable`: greedy tokens of a portable bundle in Optimum, and of PyTorch.

It runs in the environment of the peer optimum. Of the bundle, Optimum loads `score.onnx`, which
computes logits at every position; PyTorch loads the checkpoint. The request on stdin is a JSON
object with `prompts` (lists of token ids) and `new_tokens`; the answer on stdout is another.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from neo_tools.worker.protocol import claim_stdout
from neo_tools.worker.versions import versions_of

_PACKAGES = ("optimum", "optimum-onnx", "onnxruntime", "transformers", "torch")


def main(argv: list[str]) -> None:
    """Answer the request on stdin."""
    answers = claim_stdout()
    parser = argparse.ArgumentParser(
        description="A bundle in Optimum, and its checkpoint in PyTorch."
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--file-name", default="score.onnx")
    parser.add_argument("--checkpoint", type=Path, required=True)
    arguments = parser.parse_args(argv)
    request = json.load(sys.stdin)
    report = compare(arguments, request["prompts"], request["new_tokens"])
    answers.write(json.dumps(report) + "\n")
    answers.flush()


def compare(
    arguments: argparse.Namespace, prompts: list[list[int]], new_tokens: int
) -> dict[str, Any]:
    """Greedy continuations by both models: each prompt alone, then all in one left-padded batch.

    Returns:
        `versions` of packages; `alone` and `batch`, each with the token ids of `bundle` and `torch`
        as [prompts][new_tokens]; and `bundle_io`, type and shape of each input and output by name.
    """
    # Imported by name, as these packages exist only in the peer's environment.
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    optimum = importlib.import_module("optimum.onnxruntime")
    torch.set_num_threads(1)
    bundle = optimum.ORTModelForCausalLM.from_pretrained(
        arguments.bundle,
        file_name=arguments.file_name,
        provider="CPUExecutionProvider",
        local_files_only=True,
    )
    reference = transformers.GPTNeoForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    models = {"bundle": bundle, "torch": reference}
    alone = {
        name: [row for prompt in prompts for row in _generate(model, [prompt], new_tokens)]
        for name, model in models.items()
    }
    batch = {name: _generate(model, prompts, new_tokens) for name, model in models.items()}
    io = {
        node.name: [node.type, *node.shape]
        for node in (*bundle.session.get_inputs(), *bundle.session.get_outputs())
    }
    return {"versions": versions_of(_PACKAGES), "alone": alone, "batch": batch, "bundle_io": io}


def _generate(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuations without end of sequence; rows are padded on the left."""
    torch = importlib.import_module("torch")
    eos = model.config.eos_token_id
    width = max(map(len, prompts))
    ids = [[eos] * (width - len(row)) + row for row in prompts]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in prompts]
    with torch.inference_mode():
        output = model.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=eos,
        )
    rows: list[list[int]] = output[:, width:].tolist()
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
