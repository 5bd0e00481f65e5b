"""A graph that people can read: operations are put together by the module that they belong to, seeds stay as they are.

Within a spliced graph, whose order is that of execution, a part is a stretch of operations of one call of a module without
a seed in between. Stretches of such an order cannot form a cycle, and what led from one operation to another still does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx

from esper_fx.inspect.operations import arguments, attributes, class_name, module_calls, module_path, node_id, node_kind
from esper_fx.inspect.records import SeedSummary
from esper_fx.passes.names import join

if TYPE_CHECKING:
    import networkx as nx

    from esper_fx.model import MorphableModel

#: A drawing with more nodes than this is hard to read.
READABLE = 60


@dataclass
class Part:
    """One node of the result: a stretch of operations of one module, or one input, seed or output.

    Attributes:
        key: The module's path in the scope; "" for what the scope does itself; None where the part is a single node.
        whole: Whether the module is shown as a whole, and not opened to show what is in it.
        call: Which of the module's calls it is.
        nodes: What it stands for, in order.
    """

    key: str | None
    whole: bool
    call: str | None
    nodes: list[fx.Node] = field(default_factory=list)


def readable_depth(model: MorphableModel) -> int:
    """The most names in a module's path with which the graph is easy to read; 1 where none is."""
    paths = {module_path(node) for graph in model.graphs.values() for node in graph.nodes}
    deepest = max((len(path.split(".")) for path in paths), default=0)
    for depth in range(deepest, 1, -1):
        if sum(len(parts_of(model, scope, depth)) for scope in model.graphs) <= READABLE:
            return depth
    return 1


def add_modules(result: nx.MultiDiGraph, model: MorphableModel, seeds: Mapping[str, SeedSummary], depth: int) -> None:
    """Add a node for every part, and an edge for every value that goes from one part to another."""
    for scope in model.graphs:
        parts = parts_of(model, scope, depth)
        ids = {node: node_id(scope, part.nodes[0]) for part in parts for node in part.nodes}
        for part in parts:
            single = attributes(model, scope, part.nodes[0], seeds)
            result.add_node(
                ids[part.nodes[0]], **(single if part.key is None else _summed_up(model, scope, part, single))
            )
        for consumer, target in ids.items():
            for argument, producer in arguments(consumer):
                source = ids.get(producer, target)
                if source != target:
                    _add_once(result, source, target, producer, argument)


def parts_of(model: MorphableModel, scope: str, depth: int) -> list[Part]:
    """The parts of a spliced graph in order, with modules whose paths have ``depth`` names shown as a whole.

    What is only read (parameters, constants, the seeds' state) is in no part.
    """
    parts: list[Part] = []
    current: Part | None = None
    for node in model.graphs[scope].nodes:
        kind = node_kind(model, scope, node)
        if kind in ("input", "output", "seed"):
            parts.append(Part(None, False, None, [node]))
            current = None
        elif node.op != "get_attr":
            path = list(filter(None, module_path(node).split(".")))[:depth]
            key, whole = ".".join(path), len(path) == depth
            call = module_calls(node).get(key, key)
            if current is None or (current.key, current.whole, current.call) != (key, whole, call):
                current = Part(key, whole, call)
                parts.append(current)
            current.nodes.append(node)
    return parts


def _summed_up(model: MorphableModel, scope: str, part: Part, first: dict[str, Any]) -> dict[str, Any]:
    """What the graph says of a part: a module, or operations that a module does itself."""
    assert part.key is not None
    module = join(scope, part.key)
    common = {"scope": scope, "module": module, "operations": len(part.nodes)}
    if part.whole:
        return {"kind": "module", "op": "call_module", "target": module, **common, "type": class_name(model, module)}
    if len(part.nodes) == 1:
        return {**first, **common}
    return {"kind": "operation", "op": "call_function", "target": ", ".join(_names(part.nodes)), **common}


def _names(nodes: list[fx.Node]) -> Iterator[str]:
    """Names of the first few operations."""
    for node in nodes[:3]:
        yield str(getattr(node.target, "__name__", node.target)).rpartition(".")[2]
    if len(nodes) > 3:
        yield "…"


def _add_once(result: nx.MultiDiGraph, source: str, target: str, producer: fx.Node, argument: str) -> None:
    """An edge for a value, though several operations of the target read it."""
    edges = result.get_edge_data(source, target, default={}).values()
    if all(edge["value"] != producer.name for edge in edges):
        result.add_edge(source, target, argument=argument, value=producer.name)
