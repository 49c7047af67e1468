"""Tables of the documentation that repeat what the code defines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from neo_export.command.cli import _target
from neo_export.command.export_parser import export_parser
from neo_export.targets import TARGETS
from neo_export.tolerances import QUALITY

ROOT = Path(__file__).parents[2]
PRECISIONS = sorted({p for target in TARGETS.values() for p in target.precisions} - {"mixed"})


def rows(page: str, header: str) -> list[list[str]]:
    """The cells of the table whose header line begins so."""
    text = (ROOT / page).read_text(encoding="utf-8")
    table = re.search(rf"^{re.escape(header)}.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table is not None, (page, header)
    lines = [line for line in table[1].splitlines() if not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_readme_lists_the_targets_of_a_precision(precision: str) -> None:
    found = {row[0].split()[0].strip("`"): row[3] for row in rows("README.md", "| option |")}
    named = found[f"--{precision}"].split(", ")
    assert {name.strip("*") for name in named} == {
        name for name, target in TARGETS.items() if precision in target.precisions
    }
    arguments = export_parser().parse_args(["-o", "bundle", f"--{precision}"])
    assert named[0] == f"**{_target(arguments, precision)}**"
    assert not any(name.startswith("*") for name in named[1:])


def test_the_limits_of_neo_diff_are_those_of_its_page() -> None:
    found = {}
    for names, *cells in rows("docs/accuracy.md", "| precision |"):
        limits = tuple(map(float, cells[:4]))
        found |= dict.fromkeys(names.split(", "), limits)
    expected = {
        name: (
            quality.max_kl,
            quality.min_top_1,
            quality.max_perplexity_increase,
            quality.max_logit_error,
        )
        for name, quality in QUALITY.items()
    }
    expected["float, int8 cache"] = expected.pop("int8-cache")
    other = {"mixed", "fp8"}  # `quality_of`: what is asked of int4
    assert found.pop("float with int8 cache") == expected.pop("float, int8 cache")
    assert {name: found[name] for name in expected} == expected
    assert all(found[name] == expected["int4"] for name in other)
    assert found.keys() == expected.keys() | other
