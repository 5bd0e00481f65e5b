"""A graph as a list of operations over positions: what it computes, whatever its nodes are called."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx

Operations = tuple[tuple[Any, ...], ...]
"""One entry a node: kind, target, and arguments, as text unless all are nodes; a node is the position of its operation."""

_UNKNOWN = ("value", -1)


def operations(
    graph: fx.Graph,
    *,
    seeds: Collection[str] = (),
    arrays: Collection[str] = (),
    absent: Collection[str] = (),
) -> Operations:
    """What a graph computes, to be compared with what another one does.

    Args:
        graph: The graph, of modules and functions.
        seeds: Targets of seeds: they are bypassed.
        arrays: Targets of state arrays that are left out.
        absent: Placeholders that are read as None.
    """
    position: dict[fx.Node, Any] = {}
    rows: list[tuple[Any, ...]] = []
    for node in graph.nodes:
        if node.op == "call_module" and node.target in seeds:
            position[node] = position[node.args[0]]
            continue
        if node.op == "get_attr" and node.target in arrays:
            continue
        given, named = node.args, node.kwargs
        if not named and not absent and all(type(arg) is fx.Node for arg in given):  # mostly so, and much faster
            args: Any = tuple([position.get(arg, _UNKNOWN) for arg in given])
        else:
            args = repr(fx.map_arg((given, named), lambda n: position.get(n, _UNKNOWN)))
        position[node] = None if node.op == "placeholder" and node.target in absent else ("value", len(rows))
        rows.append((node.op, node.target, args))
    return tuple(rows)
