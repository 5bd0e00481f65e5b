"""The report is one page that needs nothing else, says what there is to say, and draws the graph so that it can be read."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import esper_fx
from esper_fx import inspect
from esper_fx.errors import InspectionError, ReportFileError
from esper_fx.inspect.appearance import STAGE_COLOURS
from esper_fx.inspect.layout import lay_out
from esper_fx.inspect.svg import timeline_svg
from esper_fx.lifecycle import GrowthEvent, Stage
from tests.support.inspecting import grown_transformer, odd, parts, small_transformer

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in order.

    Attributes:
        text: All its text, elements apart.
        tags: How often each element occurs.
        attributes: All attributes.
        sections: The text below each heading.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.sections: dict[str, list[str]] = {}
        self._heading = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self._heading = data
        if self.open and self.open[-1] != "style" and data.strip():
            self.text.append(data)
            self.sections.setdefault(self._heading, []).append(data)


def drawings(page: str) -> list[ET.Element]:
    return [ET.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]


@pytest.mark.parametrize("make", [small_transformer, grown_transformer, parts, odd])
def test_a_page_is_whole_and_needs_nothing_else(make: Callable[[], esper_fx.MorphableModel]) -> None:
    model = make()
    html = inspect.report(model)
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == page.tags["iframe"] == 0
    assert not {"src", "href", "srcset", "data"} & {name for name, _ in page.attributes}
    assert "http" not in html
    assert "@import" not in html
    assert all(value == "url(#arrow)" for name, value in page.attributes if "url(" in (value or ""))
    assert "prefers-color-scheme: dark" in html
    assert list(page.sections)[1:] == [
        "Summary",
        "Seeds",
        "Graph",
        "Ledger",
        "Programs",
        "Engine",
        "Passes",
        "Tracing",
    ]
    for seed in model.seeds.values():
        assert seed.name in page.sections["Seeds"]
    for record in model.pass_records:
        assert record.name in page.sections["Passes"]
    for entry in model.trace_report():
        assert (entry.name or "(the model)") in page.sections["Tracing"]
        assert not entry.why or entry.why in page.sections["Tracing"]


def test_what_has_happened_is_told() -> None:
    model = grown_transformer()
    page = Page(inspect.report(model))
    for event in model.ledger:
        assert event.why in page.sections["Ledger"]
    told = "\n".join(page.sections["Summary"])
    assert "2 of 3 seeds live; clock 5" in told
    assert "the model has run eagerly so far" in " ".join(page.sections["Programs"])
    assert "Nothing has happened yet." in Page(inspect.report(small_transformer())).sections["Ledger"]


HOSTILE = '<script>alert("1")</script>&amp;\x00'


def test_names_and_titles_cannot_become_markup() -> None:
    model = esper_fx.morph(_Named(), sites="layers.*", example_inputs=(torch.ones(2, 4),))
    seed = model.seeds["layers.</td><b>"]
    seed.germinate("affine")
    model.growth.fail(seed, RuntimeError(HOSTILE))
    html = inspect.report(model, title=HOSTILE)
    page = Page(html)
    assert page.tags["script"] == 0
    assert "\x00" not in html
    shown = HOSTILE.replace("\x00", "\\x00")
    assert page.text[:2] == [shown, shown]
    assert f"layers.</td><b> failed: RuntimeError: {shown}" in page.sections["Seeds"]
    assert "layers.</td><b>" in page.sections["Graph"]
    assert "layers.</td><b>" in page.sections["Ledger"]
    assert "layers.</td><b>" in page.sections["Tracing"]


class _Named(nn.Module):
    """Stays plain Python, so that names of nodes begin with those of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"</td><b>": nn.Linear(4, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x) if x.sum() > 0 else x
        return x


# The file.


def test_a_report_is_written_as_well_as_returned(tmp_path: Path) -> None:
    model = grown_transformer()
    target = tmp_path / "report.html"
    target.write_text("before")
    assert inspect.report(model, target) == target.read_text(encoding="utf-8")
    assert inspect.report(model, str(target), title="Mine") == target.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [target]


def test_a_report_that_cannot_be_written_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_transformer()
    missing = tmp_path / "missing" / "report.html"
    with pytest.raises(ReportFileError, match=r"the report cannot be written to .*: there is no folder .*missing"):
        inspect.report(model, missing)
    with pytest.raises(ReportFileError, match="that is a folder, give a file's name"):
        inspect.report(model, tmp_path)
    target = tmp_path / "report.html"
    target.write_text("before")

    def fail(self: Path, other: Path) -> Path:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ReportFileError, match=r"\(no space left\)"):
        inspect.report(model, target)
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]
    assert issubclass(ReportFileError, OSError)
    assert issubclass(ReportFileError, InspectionError)


# The drawings.


def test_the_graph_is_drawn_with_a_box_for_every_node_and_seeds_coloured() -> None:
    model = grown_transformer()
    graph = inspect.graph(model)
    drawing, timeline = drawings(inspect.report(model))
    boxes = {group.findtext("title"): group for group in drawing.iter("g")}
    assert list(boxes) == list(graph)
    pairs = {(source, target) for source, target in graph.edges()}
    assert sum(path.get("marker-end") is not None for path in drawing.iter("path")) == len(pairs)
    for node, attributes in graph.nodes(data=True):
        rect = boxes[node].find("rect")
        assert rect is not None
        expected = f"fill:{STAGE_COLOURS[attributes['stage']]}" if attributes["kind"] == "seed" else None
        assert rect.get("style") == expected
        assert boxes[node].get("class") == attributes["kind"]
    assert len(list(timeline.iter("rect"))) == len(model.ledger)


def test_the_timeline_is_to_scale() -> None:
    moves = [
        (10, Stage.DORMANT, Stage.GERMINATING),
        (20, Stage.GERMINATING, Stage.INCUBATING),
        (60, Stage.INCUBATING, Stage.EMBARGOED),
        (70, Stage.EMBARGOED, Stage.DORMANT),
        (90, Stage.DORMANT, Stage.GERMINATING),
    ]
    drawing = ET.fromstring(timeline_svg([GrowthEvent(step, "a", frm, to, "why") for step, frm, to in moves], 100))
    bars = [(bar.findtext("title"), bar.get("style"), bar) for bar in drawing.iter("rect")]
    assert [(note, style) for note, style, _ in bars] == [
        ("GERMINATING from step 10 to 20", f"fill:{STAGE_COLOURS['GERMINATING']}"),
        ("INCUBATING from step 20 to 60", f"fill:{STAGE_COLOURS['INCUBATING']}"),
        ("EMBARGOED from step 60 to 70", f"fill:{STAGE_COLOURS['EMBARGOED']}"),
        ("GERMINATING from step 90 to 100", f"fill:{STAGE_COLOURS['GERMINATING']}"),
    ]
    lengths = [float(bar.get("width", "")) for _, _, bar in bars]
    assert lengths == pytest.approx([64, 256, 64, 64])
    starts = [float(bar.get("x", "")) for _, _, bar in bars]
    assert [start - starts[0] for start in starts] == pytest.approx([0, 64, 320, 512])
    assert timeline_svg([], 100) == ""


@st.composite
def acyclic(draw: st.DrawFn) -> nx.MultiDiGraph:
    size = draw(st.integers(1, 12))
    pairs = st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)).filter(lambda pair: pair[0] != pair[1])
    graph = nx.MultiDiGraph()
    graph.add_nodes_from(range(size))
    graph.add_edges_from(sorted(pair) for pair in draw(st.lists(pairs, max_size=25)))
    return graph


@given(acyclic(), st.lists(st.floats(5, 200), min_size=12, max_size=12))
def test_layouts_lead_down_and_nothing_overlaps(graph: nx.MultiDiGraph, sizes: list[float]) -> None:
    widths = dict(enumerate(sizes[: len(graph)]))
    drawing = lay_out(graph, widths, 50.0)
    assert set(drawing.places) == set(graph)
    assert set(drawing.routes) == set(graph.edges())
    for (source, target), route in drawing.routes.items():
        assert route[0] == drawing.places[source]
        assert route[-1] == drawing.places[target]
        assert all(
            lower - upper == pytest.approx(50.0) for (_, upper), (_, lower) in zip(route, route[1:], strict=False)
        )
    for part in nx.weakly_connected_components(graph):
        members = graph.subgraph(part)
        top = min(drawing.places[node][1] for node in part)
        for node in part:
            above = [members.subgraph({node, *nx.ancestors(members, node)})]
            longest = nx.dag_longest_path_length(nx.DiGraph(above[0]))
            assert drawing.places[node][1] == pytest.approx(top + 50.0 * longest)
    for one in graph:
        x, y = drawing.places[one]
        assert x - widths[one] / 2 >= -0.01
        assert x + widths[one] / 2 <= drawing.width + 0.01
        assert 0 <= y <= drawing.height
        for other in graph:
            if one < other and abs(drawing.places[other][1] - y) < 40:
                assert abs(drawing.places[other][0] - x) >= (widths[one] + widths[other]) / 2
