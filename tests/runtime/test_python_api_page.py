"""The code of docs/python-api.md runs as it stands there, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

PAGE = Path(__file__).parents[2] / "docs" / "python-api.md"


def test_the_page(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("gpt-neo-1.3b", str(mini_bundle)), names)
    printed = capsys.readouterr().out
    assert printed.startswith("cpu CPU\nfp32 512 ")
    assert "2 3 [" in printed
    assert "the model has 512" in printed.splitlines()[-1]
