"""The scopes of a morphed model's copy: modules whose class morph has changed, with their graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from esper_fx.morphing.branch import NAMESPACE
from esper_fx.morphing.original import Original, Swap, original_of


@dataclass
class Scope:
    """One of them.

    Attributes:
        path: Its qualified name.
        module: The copy of it, still of the class that morph gave it.
        original: What it was.
        graph: A copy of its spliced graph in which only kept seeds are left; None where it was not traced.
        seeds: Their nodes by site, in the order of the graph.
        sites: The sites in it whose seeds are kept.
    """

    path: str
    module: nn.Module
    original: Original
    graph: fx.Graph | None
    seeds: dict[str, list[fx.Node]]
    sites: list[str]

    def remove(self, site: str) -> None:
        """Take a seed out of the graph: what read it reads its value."""
        for node in self.seeds.pop(site, []):
            _bypass(node)
        self.sites.remove(site)


def scopes_of(root: nn.Module, graphs: Mapping[str, fx.Graph], kept: set[str]) -> list[Scope]:
    """All scopes of a copy of a morphed model.

    Args:
        root: The copy.
        graphs: The spliced graphs of the model itself, by scope.
        kept: The sites whose seeds stay.
    """
    scopes = []
    for path, module in list(root.named_modules()):
        original = original_of(module)
        if original is None:
            continue
        if original.how is Swap.TRACED:
            graph, seeds = _without(graphs[original.scope], kept)
            scopes.append(Scope(path, module, original, graph, seeds, list(seeds)))
        else:
            scopes.append(Scope(path, module, original, None, {}, [path] if path in kept else []))
    return scopes


def is_seed(node: fx.Node) -> bool:
    """Whether a node of a spliced graph calls a seed."""
    return node.op == "call_module" and str(node.target).startswith(f"{NAMESPACE}.seeds.")


def _without(graph: fx.Graph, kept: set[str]) -> tuple[fx.Graph, dict[str, list[fx.Node]]]:
    """A copy of a spliced graph in which only the kept seeds are left, and these."""
    copied = fx.Graph()  # not a deep copy: that would carry on the class of our tracer
    copied.output(copied.graph_copy(graph, {}))
    seeds: dict[str, list[fx.Node]] = {}
    for node in list(copied.nodes):
        node.type = None  # annotations that are strings, or local classes, could not be saved
        if is_seed(node) and node.meta["esper_seed"] in kept:
            seeds.setdefault(node.meta["esper_seed"], []).append(node)
        elif is_seed(node):
            _bypass(node)
    return copied, seeds


def _bypass(node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    node.graph.erase_node(node)
