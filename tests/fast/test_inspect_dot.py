"""Text for Graphviz is in its grammar whatever things are called, and holds the graph."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import esper_fx
from esper_fx import inspect
from esper_fx.errors import InspectionError
from esper_fx.inspect.appearance import STAGE_COLOURS
from esper_fx.inspect.dot import quoted
from esper_fx.inspect.names import visible
from esper_fx.lifecycle import Stage
from tests.support.dot import drawn, read
from tests.support.inspecting import ODD_NAMES, grown_transformer, odd, parts, small_transformer

MODELS = [small_transformer, grown_transformer, parts, odd]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("detail", ["modules", "operations"])
def test_all_nodes_and_edges_are_there_without_the_state_of_the_seeds(
    make: Callable[[], esper_fx.MorphableModel], detail: str
) -> None:
    graph = inspect.graph(make(), detail=detail)
    shown = graph.subgraph([node for node, kind in graph.nodes(data="kind") if kind != "state"])
    dot = read(inspect.to_dot(graph))
    names = {name: drawn(attributes["tooltip"]) for name, attributes in dot.nodes.items()}
    assert sorted(names.values()) == sorted(map(visible, shown))
    assert sorted((names[a], names[b]) for a, b in dot.edges) == sorted(
        (visible(a), visible(b)) for a, b in shown.edges()
    )
    assert dot.name == graph.graph["model"]


def test_the_text_of_a_model_is_that_of_its_graph() -> None:
    model = grown_transformer()
    assert inspect.to_dot(model) == inspect.to_dot(inspect.graph(model))


def test_seeds_have_the_colour_of_their_stage() -> None:
    model = grown_transformer()
    dot = read(inspect.to_dot(model))
    seeds = {drawn(a["label"]).split("\n")[0]: a for a in dot.nodes.values() if "fillcolor" in a}
    assert {site: a["fillcolor"] for site, a in seeds.items()} == {
        "blocks.0": STAGE_COLOURS["DORMANT"],
        "blocks.1": STAGE_COLOURS["BLENDING"],
        "blocks.2": STAGE_COLOURS["FOSSILIZED"],
    }
    assert [site for site, a in seeds.items() if "dashed" in a.get("style", "")] == ["blocks.0"]
    assert drawn(seeds["blocks.1"]["label"]) == "blocks.1\nBLENDING\nlow_rank, alpha 0.75"
    assert list(STAGE_COLOURS) == [stage.name for stage in Stage]
    assert len(set(STAGE_COLOURS.values())) == len(Stage)


def test_modules_are_framed() -> None:
    dot = read(inspect.to_dot(inspect.graph(small_transformer(depth=2), depth=3)))
    framed = {
        label: [drawn(dot.nodes[n]["label"]).split("\n")[0] for n in nodes] for label, nodes in dot.clusters.values()
    }
    assert list(framed) == ["blocks", "blocks.0", "blocks.1"]
    assert framed["blocks"] == ["blocks.0", "blocks.1"]  # the seeds
    assert framed["blocks.0"] == [
        "blocks.0.attention_norm",
        "blocks.0.attention",
        "add",
        "blocks.0.feed_forward_norm",
        "blocks.0.feed_forward",
        "add",
    ]


def test_odd_names_are_drawn_as_they_are() -> None:
    dot = read(inspect.to_dot(odd()))
    firsts = [drawn(attributes["label"]).split("\n")[0] for attributes in dot.nodes.values()]
    for name in ODD_NAMES[:-1]:
        assert firsts.count(f"layers.{name}") == 2  # the module and its seed
    assert sum("…" in first for first in firsts) == 2  # the long one
    assert [label for label, _ in dot.clusters.values()] == ["layers"]


HARD = st.text(st.one_of(st.sampled_from('\\"\n\r\t<>&;{}[]-=, \x00\x7f'), st.characters()))


@given(HARD)
def test_any_text_is_quoted_so_that_it_is_drawn(text: str) -> None:
    dot = read(f"digraph {quoted(text)} {{ n [label={quoted(text)}]; }}")
    expected = "\n".join(visible(line) for line in text.split("\n"))
    assert drawn(dot.name) == drawn(dot.nodes["n"]["label"]) == expected


@given(
    st.lists(HARD, min_size=1, max_size=8, unique=True),
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7))),
    st.lists(HARD.map(lambda text: text.replace("..", ".")), min_size=8, max_size=8),
)
def test_graphs_with_random_names(names: list[str], edges: list[tuple[int, int]], modules: list[str]) -> None:
    graph = nx.MultiDiGraph(model=names[0])
    for name, module in zip(names, modules, strict=False):
        graph.add_node(name, kind="module", target=name, module=module, type=name)
    graph.add_edges_from((names[a % len(names)], names[b % len(names)]) for a, b in edges)
    dot = read(inspect.to_dot(graph))
    order = list(graph)
    assert {drawn(dot.nodes[f"n{i}"]["tooltip"]) for i in range(len(order))} == {
        "\n".join(visible(line) for line in name.split("\n")) for name in order
    }
    assert dot.edges == [(f"n{order.index(a)}", f"n{order.index(b)}") for a, b in graph.edges()]


@pytest.mark.parametrize(
    "text",
    [
        'digraph "a" { n [label="x"];',
        'digraph "a" { n [label="x\n"]; }',
        'digraph "a" { n [label="x""]; }',
        'digraph "a" { n [label=<x>]; }',
        'digraph "a" { n -> m; }',
        'digraph "a" { n [label=a-b]; }',
        'digraph "a" { node -> edge; }',
        'digraph "a" { subgraph "x" { } }',
        'digraph "a\\" { }',
        'digraph "a" { } }',
    ],
)
def test_the_reader_refuses_what_is_not_in_the_grammar(text: str) -> None:
    with pytest.raises((AssertionError, IndexError)):
        read(text)


def test_another_graph_is_refused() -> None:
    other = nx.MultiDiGraph()
    other.add_node("a")
    with pytest.raises(InspectionError, match=r"to_dot\(\) was given a graph whose node 'a' has no 'kind'"):
        inspect.to_dot(other)


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
@pytest.mark.parametrize("make", MODELS)
def test_graphviz_takes_it(make: Callable[[], esper_fx.MorphableModel]) -> None:
    text = inspect.to_dot(inspect.graph(make(), detail="operations"))
    subprocess.run(["dot", "-Tsvg"], input=text.encode(), capture_output=True, check=True)
