"""Links between the pages lead somewhere, and every page is linked from the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in LINK.findall(text):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_nothing_is_left_to_be_filled_in() -> None:
    for page in PAGES:
        found = re.findall(r"\b(?:\w*FIGURE\w*|TODO|FIXME|XXX)\b", page.read_text(encoding="utf-8"))
        assert not found, page.name


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {target for target, _ in LINK.findall((ROOT / "README.md").read_text("utf-8"))}
    pages = {str(page.relative_to(ROOT)) for page in PAGES if page.parent != ROOT}
    assert len(linked) > 10
    assert pages <= linked


def test_commands_can_be_pasted() -> None:
    """No prompt before a command: it would be pasted too."""
    for page in PAGES:
        assert not re.search(r"^\$ ", page.read_text(encoding="utf-8"), re.MULTILINE), page
