from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest
from helpers.bench_samples import results, row
from neo_runtime.errors import OutputError, RequestError
from neo_tools.bench import plot
from neo_tools.bench.csv_report import CSV_COLUMNS, to_csv
from neo_tools.bench.report import to_json, to_markdown, write

if TYPE_CHECKING:
    from pathlib import Path

SVG = "{http://www.w3.org/2000/svg}"


def tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a Markdown text, a dictionary a line."""
    found: list[list[dict[str, str]]] = []
    head: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            head = None
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split(" |")]
        if head is None:
            head = cells
            found.append([])
        elif not set(line) <= set("|-"):
            found[-1].append(dict(zip(head, cells, strict=True)))
    return found


def test_json_holds_everything() -> None:
    sample = results()
    raw = json.loads(to_json(sample))
    assert raw["schema"] == "neo-bench/1"
    assert raw["warnings"] == ["it was busy"]
    assert raw["limits"][0]["bandwidth"] == 2e10
    assert raw["limits"][0]["kernel"] == "memchr"
    assert raw["participants"][0]["first_token_excess_seconds"] == pytest.approx(0.5)
    assert raw["participants"][1]["first_token_excess_seconds"] is None
    assert [r["round_seconds"] for r in raw["rows"]] == [list(r.round_seconds) for r in sample.rows]
    assert raw["ratios"][0]["rounds"] == [3.0, 4.0, 1.0]
    assert raw["ratios"][0]["spread"] == {"median": 3.0, "min": 1.0, "max": 4.0}


def test_bytes_a_token_are_shared_by_the_batch() -> None:
    raw = json.loads(to_json(results(rows=(row(batch=4),), ratios=())))
    assert raw["rows"][0]["bytes_per_token"] == 2.5e8


def test_csv_parses_back() -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(results()))))
    assert len(lines) == 4
    assert set(CSV_COLUMNS) < set(lines[0])
    ours, peer = lines[2], lines[3]
    assert (ours["label"], ours["test"], ours["rounds"]) == ("ours", "tg2 @ d8", "3")
    assert float(ours["tokens_per_second"]) == 10.0
    assert float(ours["limit"]) * float(ours["limit_share"]) == float(ours["read_rate"])
    assert float(ours["load_to_first_token_seconds"]) == 0.7
    shares = [float(ours[f"round_limit_share{end}"]) for end in ("", "_min", "_max")]
    assert shares == [0.8, 0.7, 0.9]
    assert ours["ratio to ours"] == ""
    assert [float(peer[f"ratio to ours{end}"]) for end in ("", " min", " max")] == [3.0, 1.0, 4.0]
    assert lines[1]["ratio to ours"] == ""  # no ratio was given for the prefill


def test_markdown_tables_parse_back() -> None:
    text = to_markdown(results())
    load, prefill, decode, memory, ratios = tables(text)
    assert [line["model"] for line in load] == ["ours", "torch:fp32"]
    assert load[0]["more than prefill s"] == "0.500"
    assert load[1]["load to first token s"] == "–"
    assert prefill[0]["first token ms"] == "500.00"
    assert [line["test"] for line in prefill] == ["pp16", "pp16"]
    assert decode[0]["tok/s"] == "10.00"
    assert decode[0]["min – max"] == "5.00 – 20.00"
    assert decode[0]["of the limit"] == "50%"
    assert decode[0]["of the readings beside it"] == "80% (70% – 90%)"
    assert decode[0]["MB read/token"] == "1000.0"
    assert decode[1]["MB read/token"] == "1000.0*"
    assert "not counted in the peer's graph" in text
    assert decode[0]["Python ms"] == "0.100"
    assert memory[2]["÷ (weights + cache)"] == "2.00"
    assert ratios[0]["median"] == "3.00×"
    assert ratios[0]["min – max"] == "1.00 – 4.00"
    assert text.startswith("**Warning: it was busy**")
    assert "best read bandwidth 20.0 GB/s (memchr;" in text
    assert "median of 3 measurements 15.0" in text
    assert load[0]["prepacked MB"] == "2.5"
    assert load[0]["first load s"] == "9.000"


def test_write_knows_every_form() -> None:
    assert write(results(), "md") == to_markdown(results())
    assert write(results(), "json") == to_json(results())
    assert write(results(), "csv") == to_csv(results())


def test_points_are_operations_over_bytes_and_seconds() -> None:
    points = {(p.label, p.test): p for p in plot.points_of(results())}
    decode = points["ours", "tg2 @ d8"]
    assert decode.is_decode
    assert not decode.is_peer
    assert decode.intensity == 2.0
    assert decode.rate == pytest.approx(2e9 / 0.1)
    prefill = points["torch:fp32", "pp16"]
    assert not prefill.is_decode
    assert prefill.is_peer
    assert prefill.intensity == 100.0
    assert prefill.rate == pytest.approx(9e10 / 0.2)


def _marks(svg: ElementTree.Element, kind: str) -> dict[str, tuple[float, float]]:
    names = {"circle": ("cx", "cy"), "rect": ("x", "y")}[kind]
    found = {}
    for element in svg.iter(f"{SVG}{kind}"):
        title = element.find(f"{SVG}title")
        if title is not None and title.text is not None:
            x, y = (float(element.attrib[name]) for name in names)
            found.setdefault(title.text.split(":")[0] + title.text.split(",")[-1][:4], (x, y))
    return found


def test_svg_puts_points_where_the_axes_say() -> None:
    # 1 GB and 2 G operations in 0.05 s a step: exactly the 20 GB/s of the slope; and ten times
    # slower, and ten times as many operations as well.
    on_roof = row(label="on", round_seconds=(0.1,))
    below = row(label="below", round_seconds=(1.0,))
    right = row(label="right", round_seconds=(1.0,), flops=2e10)
    text = plot.to_svg(results(rows=(on_roof, below, right)))
    svg = ElementTree.fromstring(text)
    places = {
        name: mark
        for name, mark in _marks(svg, "circle").items()
        if name.startswith(("on", "below", "right"))
    }
    (on_x, on_y), (below_x, below_y), (right_x, right_y) = places.values()
    assert on_x == below_x
    decade_y = below_y - on_y
    assert decade_y > 0
    assert right_y == pytest.approx(on_y, abs=0.2)
    decade_x = right_x - on_x
    slope = next(line.attrib for line in svg.iter(f"{SVG}line") if line.get("stroke") == "#222222")
    x1, y1, x2, y2 = (float(slope[name]) for name in ("x1", "y1", "x2", "y2"))
    assert (y1 - y2) / (x2 - x1) == pytest.approx(decade_y / decade_x, rel=0.01)
    assert y1 - (on_x - x1) * (y1 - y2) / (x2 - x1) == pytest.approx(on_y, abs=0.5)
    # The roof of float32 meets the slope at 1e11 / 2e10 = 5 operations a byte.
    corners = [float(line.attrib["x1"]) for line in svg.iter(f"{SVG}line")]
    assert any(abs(x - (on_x + decade_x * math.log10(5 / 2))) < 0.2 for x in corners)


def test_svg_escapes_names_and_shows_every_point() -> None:
    svg = ElementTree.fromstring(plot.to_svg(results()))
    titles = [element.text or "" for element in svg.iter(f"{SVG}title")]
    assert any("<fast>" in title for title in titles)
    for label in ("ours", "torch:fp32"):
        for test in ("pp16", "tg2 @ d8"):
            assert any(title.startswith(f"{label}, {test}:") for title in titles)


def test_a_roof_without_a_peak_is_a_slope() -> None:
    sample = results()
    [limits] = sample.limits
    svg = plot.to_svg(dataclasses.replace(sample, limits=(dataclasses.replace(limits, peak={}),)))
    texts = [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert "memory" in texts
    assert not any("peak" in (text or "") for text in texts)


def test_memory_on_a_gpu_is_the_gpus() -> None:
    sample = results(rows=(row(device_bytes=2_200_000),))
    for backend, share in (("cpu", "2.00"), ("cuda", "1.10")):
        facts = dataclasses.replace(sample.participants[0], details={"backend": backend})
        parts = (facts, *sample.participants[1:])
        text = to_markdown(dataclasses.replace(sample, participants=parts))
        [line] = [line for table in tables(text) for line in table if "device MB" in line]
        assert (line["device MB"], line["÷ (weights + cache)"]) == ("2.2", share)


def test_svg_grows_with_its_legend() -> None:
    many = tuple(row(label=f"bundle {index}") for index in range(40))
    svg = ElementTree.fromstring(plot.to_svg(results(rows=many)))
    lowest = max(float(e.attrib["y"]) for e in svg.iter(f"{SVG}text"))
    assert float(svg.attrib["height"]) > lowest


def test_plot_is_checked_before_the_run(tmp_path: Path) -> None:
    plot.check_plot(tmp_path / "a.svg")
    for name in ("a.pdf", "a.png", "svg"):
        with pytest.raises(RequestError, match=r"expected a name that ends in \.svg"):
            plot.check_plot(tmp_path / name)
    with pytest.raises(OutputError, match="does not exist"):
        plot.check_plot(tmp_path / "no" / "a.svg")
