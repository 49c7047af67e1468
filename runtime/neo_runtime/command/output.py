"""The output of `neo-generate`: text, token ids, one JSON object, or JSON lines."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from neo_runtime.command.standard_streams import json_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from neo_runtime.generation.completion import Completion, Timings
    from neo_runtime.model import Model
    from neo_runtime.sampling.choice import Choice

__all__ = ["print_lines", "print_object", "print_text", "print_timings"]


def print_text(model: Model, completions: Sequence[Completion], *, ids: bool, echo: bool) -> None:
    """Print texts separated by a line `---`, or token ids; `echo` repeats each prompt first."""
    for index, completion in enumerate(completions):
        if index:
            print("---")
        prompt_ids = completion.prompt_token_ids
        if ids or model.tokenizer is None:
            row = (*prompt_ids, *completion.token_ids) if echo else completion.token_ids
            print(",".join(map(str, row)))
        else:
            if echo:
                print(model.tokenizer.decode(prompt_ids, skip_special_tokens=False), end="")
            print(completion.text)


def print_object(
    model: Model, bundle: str, completions: Sequence[Completion], loaded: float
) -> None:
    """Print one JSON object with all completions; `loaded`: seconds to load the bundle."""
    report = {
        "bundle": bundle,
        "load_seconds": loaded,
        "completions": [_facts(model, completion) for completion in completions],
    }
    print(json_text(report, indent=1))


def print_lines(
    model: Model, tags: Sequence[dict[str, Any]], done: Iterable[tuple[int, Completion]]
) -> list[Completion]:
    """Print one JSON object per completion, flushed at once: a later error loses none.

    Args:
        model: the model.
        tags: further entries for the objects of each prompt.
        done: prompt indices and completions, as they are computed.

    Returns:
        All completions.
    """
    printed = []
    for index, completion in done:
        print(json_text({"index": index} | tags[index] | _facts(model, completion)), flush=True)
        printed.append(completion)
    return printed


def print_timings(completions: Sequence[Completion], loaded: float) -> None:
    """Print the timings to stderr; `loaded`: seconds to load the bundle."""
    print(f"load {loaded:.3f} s", file=sys.stderr)
    for completion in completions:
        times = completion.timings
        print(
            f"prompt of {len(completion.prompt_token_ids)} tokens: prefill "
            f"{times.prefill_seconds:.3f} s; {len(completion.token_ids)} tokens, "
            f"{times.tokens_per_second:.1f} a second{_without_a_step(times)}",
            file=sys.stderr,
        )


def _without_a_step(times: Timings) -> str:
    said = f", {times.forced_tokens} of them forced" if times.forced_tokens else ""
    if times.draft_tokens:
        said += f", {times.accepted_draft_tokens} of {times.draft_tokens} guesses right"
    return said


def _facts(model: Model, completion: Completion) -> dict[str, Any]:
    facts = asdict(completion)
    if completion.logprobs is not None:
        facts["logprobs"] = [_choice(model, choice) for choice in completion.logprobs]
    return facts


def _choice(model: Model, choice: Choice) -> dict[str, Any]:
    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = model.tokenizer.token(token) if model.tokenizer else None
        return {"token": token, "text": text, "logprob": logprob}

    best = [entry(*other) for other in choice.top_logprobs or ()]
    return entry(choice.token, choice.logprob) | {"top_logprobs": best}
