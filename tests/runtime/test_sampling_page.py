"""docs/sampling.md and the docstring of GenerationOptions list the options that there are."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from neo_runtime.errors import RequestError
from neo_runtime.options.generation_options import GenerationOptions

PAGE = Path(__file__).parents[2] / "docs" / "sampling.md"
FIELDS = {spec.name: spec for spec in fields(GenerationOptions)}


def rows() -> dict[str, list[str]]:
    """The cells of each option's row: default, range, needs, meaning, difference."""
    found = re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in found}


def test_the_table_and_the_docstring_have_every_option_in_order() -> None:
    assert list(rows()) == list(FIELDS)
    # Cleaned: since Python 3.13 the compiler takes the indentation away.
    text = inspect.getdoc(GenerationOptions) or ""
    text = text.partition("Attributes:")[2].partition("Raises:")[0]
    assert re.findall(r"^    (\w+): ", text, re.MULTILINE) == list(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_a_row_has_the_default_and_what_the_option_needs(name: str) -> None:
    default, _, needs, meaning, _ = rows()[name]
    spec = FIELDS[name]
    assert default == repr({} if spec.default is MISSING else spec.default)
    assert needs.strip("`") == (spec.metadata["needs"] or "")
    assert meaning


def accepts(name: str, value: Any) -> bool:
    try:
        FIELDS[name].metadata["check"](name, value)
    except RequestError:
        return False
    return True


@pytest.mark.parametrize("name", FIELDS)
def test_a_row_has_the_range(name: str) -> None:
    text = rows()[name][1].replace("−", "-")
    number = type(FIELDS[name].default)
    step = 1e-3 if number is float or name == "min_p" else 1
    kind = float if step == 1e-3 else int
    if between := re.fullmatch(r"(-?\d+) – (\d+)", text):
        least, most = map(kind, between.groups())
        assert accepts(name, least)
        assert accepts(name, most)
        assert not accepts(name, least - step)
        assert not accepts(name, most + step)
    elif re.match(r"[≥>] \d+", text):
        for sign, edge in re.findall(r"([≥>≤<]) (\d+)", text):
            inward = step if sign in "≥>" else -step
            assert accepts(name, kind(edge)) == (sign in "≥≤")
            assert accepts(name, kind(edge) + inward)
            assert not accepts(name, kind(edge) - inward)
    else:
        words = (
            "bool",
            "ids",
            "texts",
            "number",
            "False, True",
            "sequences",
            "(",
            "id →",
            "functions",
            "`Model.grammar`",
        )
        assert text.startswith(words)
        assert accepts(name, True) == (text == "bool" or text.startswith("False, True"))
