"""The page in a real browser: everything is there, nothing comes from elsewhere, both themes."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
from helpers import faults
from helpers.models import DEMO
from helpers.png import colours
from neo_export.exporter import export_bundle
from neo_tools.diff.cli import main

if TYPE_CHECKING:
    from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=900,3400",
    # No name resolves: a page that needs the network is broken here.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"
)
PLOTS = ("by-layer", "by-place", "by-position", "kl-histogram")
TABLES = ("checks", "graphs", "places", "greedy", "details")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a bundle that is right, and of one whose local layers have no window."""
    folder = tmp_path_factory.mktemp("pages")
    spoiled = faults.spoiled_checkpoint(DEMO, folder / "spoiled", faults.without_window((1, 3)))
    found = {}
    for name, source in (("right", DEMO), ("wrong", spoiled)):
        export_bundle(str(source), folder / name)
        found[name] = folder / f"{name}.html"
        few = ["--tokens", "1024", "--threads", "1", "--quiet", "--report-only"]
        arguments = [folder / name, "--reference", DEMO, "--html", found[name], *few]
        assert main([*map(str, arguments)]) == 0
    return found


class _Page(HTMLParser):
    """Checks that tags are closed in order, and keeps what the tests look for."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [str(value) for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_complete_in_itself(pages: dict[str, Path]) -> None:
    for path in pages.values():
        text = path.read_text(encoding="utf-8")
        page = _Page(text)
        assert page.open == []
        assert len(set(page.ids)) == len(page.ids)
        assert {*PLOTS, *TABLES, "verdict", "first-fault"} <= set(page.ids)
        assert {"script", "link", "iframe"} & set(page.tags) == set()
        assert {"src", "href", "srcset"} & {name for name, _ in page.attributes} == set()
        assert re.search(r"url\(|@import|https?://", text) is None
        labels = [value for name, value in page.attributes if name == "aria-label"]
        assert len(labels) == page.tags.count("svg") == len(PLOTS)


def test_the_fault_is_on_it(pages: dict[str, Path]) -> None:
    right, wrong = (pages[name].read_text(encoding="utf-8") for name in ("right", "wrong"))
    assert "Within all limits" in right
    assert "Every step of every layer is right." in right
    assert "Not within all limits" in wrong
    assert "First fault: attended of layer 1" in wrong
    assert "a local layer without its window" in wrong
    assert wrong.count(">fault: attended<") == 2  # on both plots by layer
    assert "<mark>" in wrong


def chromium(folder: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [CHROMIUM, *FLAGS, profile, *arguments], capture_output=True, timeout=120, check=True
    )
    return done.stdout.decode()


@needs_chromium
def test_the_browser_builds_the_page(pages: dict[str, Path], tmp_path: Path) -> None:
    """What the browser made of it: all sections, plots with lines, the window marked."""
    dom = chromium(tmp_path, "--dump-dom", pages["wrong"].as_uri())
    for name in (*PLOTS, *TABLES, "worst-tokens"):
        assert f'id="{name}"' in dom
    assert dom.count("<svg") == len(PLOTS)
    assert 'class="marker"' in dom
    assert "window 64" in dom
    assert re.search(r'<path class="line s0" d="M[\d. ]+L', dom)
    assert len(re.findall(r'<rect class="s0"', dom)) == 40
    assert 'id="verdict" class="failed"' in dom


@needs_chromium
def test_the_page_is_drawn(pages: dict[str, Path], tmp_path: Path) -> None:
    """Light and dark: neither blank, each on its own paper, with the colours of the lines."""
    seen = {}
    for theme, number in (("dark", 0), ("light", 1)):
        picture = tmp_path / f"{theme}.png"
        prefers = f"--blink-settings=preferredColorScheme={number}"
        chromium(tmp_path, prefers, f"--screenshot={picture}", pages["right"].as_uri())
        seen[theme] = colours(picture)
    assert seen["light"].most_common(1)[0][0] == (0xFF, 0xFF, 0xFF)
    assert seen["dark"].most_common(1)[0][0] == (0x0D, 0x11, 0x17)
    for theme, line in (("light", (0x00, 0x72, 0xB2)), ("dark", (0x56, 0xB4, 0xE9))):
        assert seen[theme][line] > 500, theme
        assert len(seen[theme]) > 100, theme
