"""Check that a draft's graph is sound and still means what was traced."""

from __future__ import annotations

from typing import Any

from torch import fx

from esper_fx.errors import MorphError
from esper_fx.passes.pipeline import Draft


def check(draft: Draft) -> None:
    """Raise MorphError unless the graph is well formed, complete and equal to the traced one with its seeds bypassed.

    The invariants: the graph passes torch.fx's own lint; every seed reads one value and the two state arrays; every site
    that was spliced has its seed on every visit; nothing but seeds and state arrays was added, and nothing was lost.
    """
    if draft.graph is None or draft.original is None:
        return
    try:
        draft.graph.lint()
    except Exception as error:
        raise MorphError(f"the graph of {type(draft.root).__name__} is malformed: {error}") from error
    seeds = set(draft.seeds.values())
    arrays: set[str] = set()
    for node in draft.graph.nodes:
        if node.op == "call_module" and node.target in seeds:
            _check_seed(node)
            arrays.update(str(array.target) for array in node.args[1:])
    for site, visits in draft.sites.items():
        _check_site(draft, site, list(dict.fromkeys(visits)), seeds)
    expected, actual = _canonical(draft.original, set(), set()), _canonical(draft.graph, seeds, arrays)
    if expected != actual:
        index = next((i for i, (a, b) in enumerate(zip(expected, actual, strict=False)) if a != b), -1)
        detail = f"first difference: {expected[index]} became {actual[index]}" if index >= 0 else "their lengths differ"
        raise MorphError(f"the graph of {type(draft.root).__name__} no longer means what was traced; {detail}")


def _check_seed(node: fx.Node) -> None:
    """A seed reads one value and then the arrays called alpha and gate."""
    names = [
        str(arg.target).rpartition(".")[2] for arg in node.args[1:] if isinstance(arg, fx.Node) and arg.op == "get_attr"
    ]
    if len(node.args) != 3 or not isinstance(node.args[0], fx.Node) or names != ["alpha", "gate"]:
        raise MorphError(f"seed node {node.format_node()} must read one value and the state arrays alpha and gate")


def _check_site(draft: Draft, site: str, visits: list[fx.Node], seeds: set[str]) -> None:
    """Every visit is a value of the graph, and its site's seed, once, stands between it and all who use it."""
    assert draft.graph is not None
    for value in visits:
        if value.graph is not draft.graph or value not in draft.graph.nodes:
            raise MorphError(f"site {site!r} names {value.name!r}, which is not a node of the graph")
    if site not in draft.seeds:
        return
    target = draft.seeds[site]
    spliced = sum(node.op == "call_module" and node.target == target for node in draft.graph.nodes)
    if spliced != len(visits):
        raise MorphError(f"site {site!r} is visited {len(visits)} times but its seed is called {spliced} times")
    for value in visits:
        found = False
        node = value
        while any(user.target in seeds and user.args[0] is node for user in node.users):
            if len(node.users) != 1:
                others = sorted(user.name for user in node.users if user.target not in seeds)
                raise MorphError(f"users {others} of {node.name!r} at site {site!r} read past its seed")
            (node,) = node.users
            found = found or node.target == target
        if not found:
            raise MorphError(f"the seed of site {site!r} does not follow its value {value.name!r}")


def _canonical(graph: fx.Graph, seeds: set[str], arrays: set[str]) -> list[tuple[Any, ...]]:
    """The graph as a list of operations over positions, with seeds bypassed and the state arrays left out."""
    position: dict[fx.Node, int] = {}
    rows: list[tuple[Any, ...]] = []
    for node in graph.nodes:
        if node.op == "call_module" and node.target in seeds:
            position[node] = position[node.args[0]]
            continue
        if node.op == "get_attr" and node.target in arrays:
            continue
        args = fx.map_arg((node.args, node.kwargs), lambda n: ("value", position.get(n, -1)))
        rows.append((node.op, node.target, repr(args)))
        position[node] = len(rows) - 1
    return rows
