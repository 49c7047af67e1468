"""The Python code of the documentation runs as it is, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

DOCS = Path(__file__).parents[2] / "docs"


def run_blocks(page: str, bundle: Path) -> tuple[int, dict[str, Any]]:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("gpt-neo-1.3b", str(bundle)), names)
    return len(blocks), names


def test_the_page(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_blocks("python-api.md", mini_bundle)[0] == 7
    printed = capsys.readouterr().out
    assert printed.startswith("cpu CPU\nfp32 512 ")
    assert "2 3 [" in printed
    assert "the model has 512" in printed.splitlines()[-1]


def test_the_page_of_options(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_blocks("sampling.md", mini_bundle)[0] == 3
    assert capsys.readouterr().out.strip()


def test_the_page_about_serving(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_blocks("serving.md", mini_bundle)[0] == 4
    assert capsys.readouterr().out.strip()


def test_the_page_about_guessed_tokens(
    mini_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_blocks("guessed-tokens.md", mini_bundle)[0] == 2
    assert capsys.readouterr().out.strip()
