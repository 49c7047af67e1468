"""What the pictures are made of."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from neo_export.reports import svg


@pytest.mark.parametrize(
    ("log", "values"), [(False, (10, 35, 60, 110)), (True, (0.1, 1e-1 * 10**0.5, 1, 10))]
)
def test_an_axis(log: bool, values: tuple[float, ...]) -> None:
    """From the low end to the high one, upwards too; what lies outside is drawn outside."""
    low, middle, high, beyond = values
    for start, stop in ((20.0, 120.0), (120.0, 20.0)):
        axis = svg.Axis(low=low, high=high, start=start, stop=stop, log=log)
        expected = (start, (start + stop) / 2, stop, 2 * stop - start)
        assert [axis(v) for v in (low, middle, high, beyond)] == pytest.approx(expected)


def test_an_axis_without_length() -> None:
    assert svg.Axis(low=3, high=3, start=20, stop=120)(3) == 20


@pytest.mark.parametrize(
    ("span", "step"), [(8, 1), (8.1, 2), (17, 5), (41, 10), (0.4, 0.05), (1.2e6, 2e5)]
)
def test_a_round_step(span: float, step: float) -> None:
    assert svg.round_step(span) == pytest.approx(step)


def test_elements_are_escaped() -> None:
    parts = [
        svg.element("rect", class_="a", stroke_width=2, x=1.26, aria_label='"<&'),
        svg.text(1, 2, "a < b & c", "label"),
        svg.mark(1, 2, "red", "<mark>"),
    ]
    assert parts[0] == '<rect class="a" stroke-width="2" x="1.3" aria-label="&quot;&lt;&amp;"/>'
    found = ElementTree.fromstring(svg.document(10, 20, "<title>", parts))
    assert found.attrib["viewBox"] == "0 0 10 20"
    texts = ["".join(element.itertext()) for element in found]
    assert texts[0] == "<title>"
    assert texts[-2:] == ["a < b & c", "<mark>"]


def test_a_path_has_gaps() -> None:
    points = [(1, 2), (3, 4), None, (5, 6.06), (7, 8)]
    assert (
        svg.path(points, "line") == '<path class="line" d="M1.0 2.0 L3.0 4.0 M5.0 6.1 L7.0 8.0"/>'
    )


def test_axes_draw_a_line_a_tick() -> None:
    x = svg.Axis(low=0, high=10, start=60, stop=160)
    y = svg.Axis(low=1, high=100, start=110, stop=10, log=True)
    for columns, lines in ((True, 5), (False, 4)):
        drawn = svg.axes(x, y, [(5, "five"), (10, "ten")], [(1, "1"), (10, "10"), (100, "100")],
                         "bytes", "", columns=columns)  # fmt: skip
        found = ElementTree.fromstring(f"<svg>{drawn}</svg>")
        assert len(found.findall("line")) == lines
        assert [text.text for text in found.iter("text")] == [
            "1",
            "10",
            "100",
            "five",
            "ten",
            "bytes",
        ]
        [five] = [text for text in found.iter("text") if text.text == "five"]
        assert five.attrib["x"] == "110.0"
