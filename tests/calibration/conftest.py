"""Statistics of the demo model, for tests that ask what they are worth on other text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from helpers.models import DEMO
from neo_calibration.cli import main as calibrate

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def last_stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last held-out stories; tests measure on the first."""
    lines = (DEMO / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    text = tmp_path_factory.mktemp("stories") / "text.jsonl"
    text.write_text("\n".join(lines[-120:]), encoding="utf-8")
    return text


@pytest.fixture(scope="session")
def statistics(last_stories: Path) -> Path:
    """Of 8192 tokens of these. Read only."""
    folder = last_stories.with_name("stats")
    command = [str(DEMO), "--text", str(last_stories), "-o", str(folder)]
    assert calibrate([*command, "--tokens", "8192"]) == 0
    return folder
