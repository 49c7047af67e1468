"""`python -m neo_tools.clients`: what it asks for, and what it makes of the rounds."""

from __future__ import annotations

import json
from statistics import mean
from typing import TYPE_CHECKING

import neo_runtime
import pytest
from neo_tools.clients.__main__ import main
from neo_tools.clients.measure import PREFIXES, WAYS, Load, Round, measure
from neo_tools.clients.report import markdown, summary

if TYPE_CHECKING:
    from pathlib import Path

LOAD = Load(clients=3, requests=2, prompt=5, new_tokens=8)


def test_requests_end_at_different_times() -> None:
    load = Load(clients=8, requests=4, prompt=10, new_tokens=32)
    asked = [load.new_tokens_of(c, r) for c in range(8) for r in range(4)]
    assert (min(asked), max(asked)) == (16, 48)
    assert mean(asked) == pytest.approx(32, abs=1)
    assert load.tokens == sum(asked)
    assert load.length == 10 + 48
    assert Load(clients=1, requests=1, prompt=1, new_tokens=1).new_tokens_of(0, 0) == 1


def test_every_way_answers_every_request(mini_bundle: Path) -> None:
    said: list[str] = []
    with neo_runtime.load(mini_bundle, threads=1) as model:
        rounds = measure(model, LOAD, 3, said.append)
        assert model.cache_bytes_in_use == 0
        with pytest.raises(neo_runtime.ContextLengthError):
            measure(model, Load(clients=1, requests=1, prompt=508, new_tokens=5), 1, said.append)
    assert list(rounds) == list(WAYS)
    for measured in (one for each in rounds.values() for one in each):
        assert len(measured.answers) == len(measured.first_tokens) == 6
        pairs = zip(measured.first_tokens, measured.answers, strict=True)
        assert all(0 < first < took for first, took in pairs)
        assert max(measured.answers) <= measured.seconds
    order = [line.split(":")[0] for line in said if "round" in line]
    assert order[:9] == [WAYS[(turn + place) % 3] for turn in range(3) for place in range(3)]


def test_prompts_that_share_a_beginning(mini_bundle: Path) -> None:
    """In each round another one, so that no round finds what the one before has left."""
    load = Load(clients=2, requests=2, prompt=80, new_tokens=4, shared=70)
    said: list[str] = []
    with neo_runtime.load(mini_bundle, threads=1) as model:
        vocab_size = model.manifest.model.vocab_size
        rounds = [load.prompts(index, vocab_size) for index in range(3)]
        found = measure(model, load, 1, said.append)
    assert list(found) == [*WAYS, PREFIXES]
    for prompts in rounds:
        assert [len(prompt) for prompt in prompts] == [80] * 4
        assert len({tuple(prompt[:70]) for prompt in prompts}) == 1
        assert len({tuple(prompt[70:]) for prompt in prompts}) == 4
    assert len({tuple(prompts[0][:10]) for prompts in rounds}) == 3


def test_figures() -> None:
    def rounds(*seconds: float) -> list[Round]:
        return [Round(seconds=s, first_tokens=(0.1, 0.3), answers=(s / 2, s)) for s in seconds]

    seconds = ((4, 6, 8), (4, 3, 8), (2, 2, 2))
    served = summary(dict(zip(WAYS, (rounds(*s) for s in seconds), strict=True)), LOAD)
    first, second, third = served
    assert first.speedup is None
    assert second.speedup is not None
    assert (second.speedup.median, second.speedup.max) == (1, 2)
    assert third.speedup is not None
    assert (third.speedup.min, third.speedup.median, third.speedup.max) == (2, 3, 4)
    assert third.tokens_per_second.median == LOAD.tokens / 2
    assert first.first_token == pytest.approx(0.2)
    facts = {"bundle": "b", "precision": "int8", "runs_on": "CPU", "machine": "m"}
    table = markdown(served, LOAD, facts | {"repetitions": 3})
    assert "| scheduler | 20.5 (20.5 to 20.5) | 3.00 (2.00 to 4.00) | 0.20 (0.30) |" in table


def test_the_command(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["-c", "2", "-q", "1", "-p", "4", "-n", "4", "-r", "1", "-t", "1"]
    assert main([str(mini_bundle), *small, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["way"] for each in found["served"]] == list(WAYS)
    assert found["load"]["clients"] == 2
    assert main([str(mini_bundle), *small]) == 0
    assert "| one by one |" in capsys.readouterr().out
    assert main([str(mini_bundle), *small, "--http", "--json"]) == 0
    [*_, http] = json.loads(capsys.readouterr().out)["served"]
    assert http["way"] == "neo-serve"
    assert 0 < http["first_token"] < http["answer"]
    assert main([str(mini_bundle), "-p", "512"]) == 2
    assert "the longest request needs 560 positions, but the bundle has 512" in (
        capsys.readouterr().err
    )
    assert main([str(mini_bundle), *small, "-s", "4"]) == 2
    assert "--shared is 4, expected 0 to 3" in capsys.readouterr().err
    shared = ["-p", "40", "-s", "33", "--http", "--json"]
    assert main([str(mini_bundle), *small, *shared]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["way"] for each in found["served"]] == [*WAYS, "prefix cache", "neo-serve"]
    assert found["load"]["shared"] == 33
    with pytest.raises(SystemExit):
        main([str(mini_bundle), "-c", "0"])
