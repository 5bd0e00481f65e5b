"""A model's graph as text for Graphviz."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from esper_fx.inspect.appearance import STAGE_COLOURS, label
from esper_fx.inspect.names import visible
from esper_fx.inspect.network import as_graph

if TYPE_CHECKING:
    import networkx as nx

_SHAPES = {"input": "ellipse", "output": "ellipse", "operation": "ellipse", "parameter": "note", "constant": "note"}


def to_dot(model_or_graph: nn.Module | nx.MultiDiGraph) -> str:
    """The graph in Graphviz' language: seeds coloured by stage, a frame around what belongs to one module.

    The arrays that all seeds read are left out. Nodes are called ``n0``, ``n1``, … in the order of the graph; a node's
    ``tooltip`` is its name in the graph.

    Args:
        model_or_graph: What :func:`graph` has made, or a morphed model, of which it then makes one.

    Raises:
        InspectionError: It is neither.
    """
    graph = as_graph(model_or_graph, "to_dot")
    names = {node: f"n{number}" for number, node in enumerate(graph)}
    hidden = {node for node, kind in graph.nodes(data="kind") if kind == "state"}
    root = _Frame("")
    for node, attributes in graph.nodes(data=True):
        if node not in hidden:
            root.within(_frame_of(attributes)).lines.append(_node(names[node], str(node), attributes))
    lines = [f"digraph {quoted(str(graph.graph.get('model', '')))} {{", "  rankdir=TB;"]
    lines += ['  node [shape=box, style="rounded,filled", fillcolor=white, fontname=Helvetica, fontsize=10];']
    lines += root.text("  ")
    lines += [
        f"  {names[source]} -> {names[target]};"
        for source, target in graph.edges()
        if source not in hidden and target not in hidden
    ]
    return "\n".join([*lines, "}", ""])


def quoted(text: str) -> str:
    """A text as a quoted string that is drawn as it is, with line breaks where it has some.

    In quotes a backslash begins an escape of the drawing, and ``&`` an HTML entity. Other invisible characters are drawn
    as Python writes them.
    """
    lines = (visible(line).replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;") for line in text.split("\n"))
    return '"' + "\\n".join(lines) + '"'


@dataclass
class _Frame:
    """A cluster: the nodes of a module, and the clusters of the modules in it.

    Attributes:
        path: The module.
        lines: Statements of its nodes.
        inner: Its clusters, by name.
    """

    path: str
    lines: list[str] = field(default_factory=list)
    inner: dict[str, _Frame] = field(default_factory=dict)

    def within(self, path: list[str]) -> _Frame:
        """The frame of a module in this one, made where it is new."""
        if not path:
            return self
        name, *rest = path
        if name not in self.inner:
            self.inner[name] = _Frame(f"{self.path}.{name}" if self.path else name)
        return self.inner[name].within(rest)

    def text(self, indent: str) -> Iterator[str]:
        """Its statements; a frame around a single frame is not drawn."""
        yield from (f"{indent}{line}" for line in self.lines)
        for frame in self.inner.values():
            if not frame.lines and len(frame.inner) == 1:
                yield from frame.text(indent)
                continue
            yield f"{indent}subgraph {quoted(f'cluster {frame.path}')} {{"
            yield f"{indent}  label={quoted(frame.path)}; color=gray; fontname=Helvetica; fontsize=9;"
            yield from frame.text(f"{indent}  ")
            yield f"{indent}}}"


def _frame_of(attributes: Mapping[str, Any]) -> list[str]:
    """The module in whose frame a node is drawn: for modules and seeds, the one around theirs."""
    path = list(filter(None, str(attributes["module"]).split(".")))
    return path[:-1] if attributes["kind"] in ("module", "seed") else path


def _node(name: str, identity: str, attributes: Mapping[str, Any]) -> str:
    kind = attributes["kind"]
    options = {"label": quoted("\n".join(label(attributes))), "tooltip": quoted(identity)}
    if kind == "seed":
        options["fillcolor"] = quoted(STAGE_COLOURS[attributes["stage"]])
        if not attributes["live"]:
            options["style"] = quoted("rounded,filled,dashed")
    if kind in _SHAPES:
        options["shape"] = _SHAPES[kind]
    return f"{name} [{', '.join(f'{key}={value}' for key, value in options.items())}];"
