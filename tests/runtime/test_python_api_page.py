"""The Python code of the documentation runs as it is, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

DOCS = Path(__file__).parents[2] / "docs"


def run_blocks(page: str, bundle: Path) -> int:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("gpt-neo-1.3b", str(bundle)), names)
    return len(blocks)


def test_the_page(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_blocks("python-api.md", mini_bundle) == 5
    printed = capsys.readouterr().out
    assert printed.startswith("cpu CPU\nfp32 512 ")
    assert "2 3 [" in printed
    assert "the model has 512" in printed.splitlines()[-1]


def test_the_page_of_options(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_blocks("sampling.md", mini_bundle) == 1
    assert capsys.readouterr().out.strip()
