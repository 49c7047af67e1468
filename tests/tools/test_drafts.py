"""`python -m neo_tools.drafts`: what takes turns, and what it makes of the rounds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import neo_runtime
import pytest
from helpers.hf_reference import heldout_texts
from neo_runtime import DraftModel, PromptLookup
from neo_tools.drafts.__main__ import main
from neo_tools.drafts.measure import WITHOUT, Texts, checking_seconds, texts
from neo_tools.drafts.report import checked, continued, markdown

if TYPE_CHECKING:
    from pathlib import Path


def test_rounds(mini_bundle: Path) -> None:
    prompts = [text[:300] for text in heldout_texts()[:3]]
    said: list[str] = []
    with neo_runtime.load(mini_bundle, threads=1) as model:
        costs = checking_seconds(model, 20, (2, 5), 3)
        drafters = {"lookup": PromptLookup(), "itself": DraftModel(model)}
        found = texts(model, prompts, 30, drafters, 2, said.append)
        assert model.cache_bytes_in_use == 0
        for prompt in prompts:
            assert len(model.generate(prompt, max_new_tokens=30).token_ids) == 30
    assert {count: len(seconds) for count, seconds in costs.items()} == {1: 3, 2: 3, 5: 3}
    assert list(found) == [WITHOUT, "lookup", "itself"]
    assert all(each.tokens == 90 and each.differing == 0 for each in found.values())
    assert all(len(each.seconds) == 2 and min(each.seconds) > 0 for each in found.values())
    assert found[WITHOUT].drafted == 0
    assert found["itself"].accepted > 40


def test_figures() -> None:
    costs = checked({1: [0.01, 0.02, 0.01], 5: [0.02, 0.02, 0.03]})
    assert [each.steps.median for each in costs] == [1, 2]
    assert costs[1].steps.max == pytest.approx(3)
    assert costs[1].milliseconds.median == pytest.approx(20)

    def of(*seconds: float, accepted: int = 0, differing: int = 0) -> Texts:
        return Texts(
            prompts=7,
            seconds=list(seconds),
            tokens=100,
            drafted=60,
            accepted=accepted,
            differing=differing,
        )

    ways = continued({WITHOUT: of(4, 8), "lookup": of(2, 2, accepted=50, differing=1)})
    assert ways[1].speedup.median == pytest.approx(3)
    assert ways[1].tokens_per_run == 2
    facts = {"bundle": "b", "precision": "int8", "runs_on": "CPU", "machine": "m"}
    table = markdown(
        costs, ways, {**facts, "repetitions": 2, "depth": 9, "prompts": 1, "new_tokens": 5}
    )
    assert "7 prompts, 5 new tokens each" in table
    assert "| 5 | 20.0 | 2.00 (1.00 to 3.00) |" in table
    assert "| lookup | 46.5 | 3.00 (2.00 to 4.00) | 50 of 60 | 2.00 | 1 |" in table


def test_the_command(mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, heldout_texts()[:2])))
    small = [str(mini_bundle), "-d", "9", "-r", "1", "-t", "1"]
    assert main([*small, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["tokens"] for each in found["checking"]] == [1, 2, 3, 5, 9, 17]
    assert found["texts"] == []
    more = ["--prompts-file", str(prompts), "--prompts", "1", "--new-tokens", "5"]
    more += ["--prompt-tokens", "40"]
    assert main([*small, *more, "--draft-model", str(mini_bundle)]) == 0
    table = capsys.readouterr().out
    assert "1 prompts, 5 new tokens each" in table
    assert "| draft model |" in table


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--draft-model", "BUNDLE"], "--draft-model needs --prompts-file"),
        (["--new-tokens", "5"], "--new-tokens needs --prompts-file"),
        (["--prompts-file", "/nowhere"], "/nowhere"),
        (["--prompts-file", "TEXTS", "--new-tokens", "600"], "max_new_tokens"),
        (["--prompts-file", "TEXTS", "--prompt-tokens", "400"], "no prompt has 400 tokens or more"),
        (["-d", "500"], "--depth is 500, expected at most 495, as the bundle has 512"),
    ],
)
def test_what_is_wrong_is_told_before_any_work(
    wrong: list[str],
    message: str,
    mini_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "texts").write_text('"Tom"\n"The dog"\n')
    places = {"BUNDLE": str(mini_bundle), "TEXTS": str(tmp_path / "texts")}
    arguments = [places.get(word, word) for word in wrong]
    assert main([str(mini_bundle), "-t", "1", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "round" not in said.err
    assert "verifying" not in said.err


@pytest.mark.parametrize("depth", [2, 80, 81, 97])
def test_any_depth(depth: int, mini_bundle: Path) -> None:
    """Where a local layer's buffer is full, too."""
    with neo_runtime.load(mini_bundle, threads=1) as model:
        assert len(checking_seconds(model, depth, (2,), 1)[2]) == 1
