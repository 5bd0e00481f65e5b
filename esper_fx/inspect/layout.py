"""Where the nodes of a drawing go: in layers, so that every edge leads down, with few crossings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx as nx

Node = Hashable

#: Pixels between two nodes of a layer, and between two parts of a graph that nothing connects.
_GAP, _APART = 18.0, 40.0
#: Pixels after which what is not connected goes below instead of beside.
_ROW = 900.0
#: Passes over the layers that reduce crossings, and that straighten edges.
_SWEEPS = 6


@dataclass(frozen=True)
class Drawing:
    """A layout in pixels, y pointing down.

    Attributes:
        places: For each node the middle of its box.
        routes: For each pair of nodes that an edge connects, the points that it passes, both ends included.
        width: Width of the whole.
        height: Its height.
    """

    places: Mapping[Node, tuple[float, float]]
    routes: Mapping[tuple[Node, Node], list[tuple[float, float]]]
    width: float
    height: float


def lay_out(graph: nx.MultiDiGraph, widths: Mapping[Node, float], layer_height: float) -> Drawing:
    """Lay out a graph without cycles; a node's layer is the length of the longest path to it.

    Args:
        graph: The graph.
        widths: Pixels that each node's box is wide.
        layer_height: Pixels from one layer to the next.
    """
    import networkx as nx

    places: dict[Node, tuple[float, float]] = {}
    routes: dict[tuple[Node, Node], list[tuple[float, float]]] = {}
    left = top = right = bottom = 0.0
    for members in nx.weakly_connected_components(graph):
        part = nx.DiGraph(graph.subgraph(members))
        layers, chains = _layers(part, [node for node in graph if node in members])
        _reduce_crossings(layers, chains.values())
        middles = _straighten(layers, chains.values(), widths)
        begin = min(x - widths.get(node, 0.0) / 2 for node, x in middles.items())
        end = max(x + widths.get(node, 0.0) / 2 for node, x in middles.items())
        if left and left + end - begin > _ROW:
            left, top = 0.0, bottom + _APART
        at = {
            node: (left + middles[node] - begin, top + (number + 0.5) * layer_height)
            for number, layer in enumerate(layers)
            for node in layer
        }
        places |= {node: at[node] for node in members}
        routes |= {edge: [at[node] for node in chain] for edge, chain in chains.items()}
        right = max(right, left + end - begin)
        bottom = max(bottom, top + len(layers) * layer_height)
        left += end - begin + _APART
    return Drawing(places, routes, right, bottom)


def _layers(part: nx.DiGraph, order: list[Node]) -> tuple[list[list[Node]], dict[tuple[Node, Node], list[Node]]]:
    """The nodes by layers, and each edge as a chain with a bend in every layer that it passes."""
    import networkx as nx

    depth = {node: number for number, layer in enumerate(nx.topological_generations(part)) for node in layer}
    layers: list[list[Node]] = [[] for _ in range(max(depth.values()) + 1)]
    for node in order:
        layers[depth[node]].append(node)
    chains: dict[tuple[Node, Node], list[Node]] = {}
    for source in order:
        for target in part.successors(source):
            bends: list[Node] = [(source, target, number) for number in range(depth[source] + 1, depth[target])]
            for bend, number in zip(bends, range(depth[source] + 1, depth[target]), strict=True):
                layers[number].append(bend)
            chains[source, target] = [source, *bends, target]
    return layers, chains


def _neighbours(chains: Iterable[list[Node]]) -> tuple[dict[Node, list[Node]], dict[Node, list[Node]]]:
    """For each node and bend those right above it, and those right below."""
    above: dict[Node, list[Node]] = defaultdict(list)
    below: dict[Node, list[Node]] = defaultdict(list)
    for chain in chains:
        for upper, lower in zip(chain, chain[1:], strict=False):
            above[lower].append(upper)
            below[upper].append(lower)
    return above, below


def _passes(
    layers: list[list[Node]], chains: Iterable[list[Node]]
) -> Iterator[tuple[list[Node], dict[Node, list[Node]]]]:
    """Layers one by one, downwards and upwards in turn, each with the neighbours to go by."""
    above, below = _neighbours(chains)
    for sweep in range(_SWEEPS):
        for layer in layers[1:] if sweep % 2 == 0 else layers[-2::-1]:
            yield layer, above if sweep % 2 == 0 else below


def _reduce_crossings(layers: list[list[Node]], chains: Iterable[list[Node]]) -> None:
    """Order each layer by the mean position of its nodes' neighbours, in place."""
    rank = {node: position for layer in layers for position, node in enumerate(layer)}
    for layer, near in _passes(layers, chains):
        mean = {node: fmean(rank[other] for other in near[node]) if near[node] else rank[node] for node in layer}
        layer.sort(key=mean.__getitem__)
        rank.update((node, position) for position, node in enumerate(layer))


def _straighten(
    layers: list[list[Node]], chains: Iterable[list[Node]], widths: Mapping[Node, float]
) -> dict[Node, float]:
    """x of every node and bend: near its neighbours', in the order of the layer, no two overlapping."""
    x: dict[Node, float] = {}
    for layer in layers:
        x.update(_apart(layer, dict.fromkeys(layer, 0.0), widths))
    for layer, near in _passes(layers, chains):
        wanted = {node: fmean(x[other] for other in near[node]) if near[node] else x[node] for node in layer}
        x.update(_apart(layer, wanted, widths))
    return x


def _apart(layer: list[Node], wanted: Mapping[Node, float], widths: Mapping[Node, float]) -> dict[Node, float]:
    """The middle between pushing what overlaps to the right and pushing it to the left."""
    needed = [
        (widths.get(one, 0.0) + widths.get(other, 0.0)) / 2 + _GAP for one, other in zip(layer, layer[1:], strict=False)
    ]
    rightwards = [wanted[layer[0]]]
    for node, room in zip(layer[1:], needed, strict=True):
        rightwards.append(max(wanted[node], rightwards[-1] + room))
    leftwards = [wanted[layer[-1]]]
    for node, room in zip(reversed(layer[:-1]), reversed(needed), strict=True):
        leftwards.append(min(wanted[node], leftwards[-1] - room))
    return {node: (right + left) / 2 for node, right, left in zip(layer, rightwards, reversed(leftwards), strict=True)}
