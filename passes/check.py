"""Check that a draft's graph is sound and still means what was traced."""

from __future__ import annotations

import operator
from collections import Counter, deque

from torch import fx

from esper_fx.errors import MorphError
from esper_fx.passes.operations import operations
from esper_fx.passes.pipeline import Draft


def check(draft: Draft) -> None:
    """Raise MorphError unless the graph is well formed, complete and equal to the traced one with its seeds bypassed.

    The invariants: the graph passes torch.fx's own lint; a source is what its site's module read; every seed reads one value,
    the two state arrays and its visit's source, if there is one; every site that was spliced has its seed on every visit;
    nothing but seeds and state arrays was added, and nothing was lost.
    """
    if draft.graph is None:
        return
    # A pass that only looks leaves all of these as they were: then the graph is as sound as it was, and means the same.
    seen = tuple([part for node in draft.graph.nodes for part in (node, node.op, node.target, node.args, node.kwargs)])
    unchanged, draft.checked = len(seen) == len(draft.checked) and all(map(operator.is_, seen, draft.checked)), ()
    if not unchanged:
        try:
            draft.graph.lint()
        except Exception as error:
            raise MorphError(f"the graph of {type(draft.root).__name__} is malformed: {error}") from error
    seeds = set(draft.seeds.values())
    _check_sources(draft, seeds)
    sources = {
        draft.seeds[site]: dict(zip(draft.sites[site], nodes, strict=True))
        for site, nodes in draft.sources.items()
        if site in draft.seeds
    }
    arrays: set[str] = set()
    for node in draft.graph.nodes:
        if node.op == "call_module" and node.target in seeds:
            _check_seed(node, seeds, sources.get(node.target, {}))
            arrays.update(str(array.target) for array in node.args[1:3])
    nodes = set(draft.graph.nodes)
    calls = Counter(node.target for node in nodes if node.op == "call_module" and node.target in seeds)
    for site, visits in draft.sites.items():
        target = draft.seeds.get(site)
        _check_visits(site, list(dict.fromkeys(visits)), nodes)
        if target is not None:
            _check_site(site, list(dict.fromkeys(visits)), target, calls[target], seeds)
    expected = draft.traced
    actual = expected if unchanged else operations(draft.graph, seeds=seeds, arrays=arrays)
    if expected != actual:
        index = next((i for i, (a, b) in enumerate(zip(expected, actual, strict=False)) if a != b), -1)
        detail = f"first difference: {expected[index]} became {actual[index]}" if index >= 0 else "their lengths differ"
        raise MorphError(f"the graph of {type(draft.root).__name__} no longer means what was traced; {detail}")
    draft.checked = seen


def _check_sources(draft: Draft, seeds: set[str]) -> None:
    """A site has one source for each visit, and it is what that visit's module was given."""
    for site, sources in draft.sources.items():
        visits = draft.sites.get(site, [])
        if len(sources) != len(visits):
            raise MorphError(f"site {site!r} has {len(visits)} visits but {len(sources)} sources")
        for visit, source in zip(visits, sources, strict=True):
            if not _made_from(visit, source, seeds):
                raise MorphError(
                    f"{source.name!r}, a source of site {site!r}, is not what {visit.name!r} was made from"
                )


def _check_seed(node: fx.Node, seeds: set[str], sources: dict[fx.Node, fx.Node]) -> None:
    """A seed reads one value, then the arrays called alpha and gate, then its visit's source where there is one."""
    value, arrays, more = node.args[0] if node.args else None, node.args[1:3], node.args[3:]
    names = [str(arg.target).rpartition(".")[2] for arg in arrays if isinstance(arg, fx.Node) and arg.op == "get_attr"]
    if not isinstance(value, fx.Node) or names != ["alpha", "gate"]:
        raise MorphError(f"seed node {node.format_node()} must read one value and the state arrays alpha and gate")
    wanted = sources.get(_behind_seeds(value, seeds))
    actual = [_behind_seeds(arg, seeds) if isinstance(arg, fx.Node) else arg for arg in more]
    if actual != ([] if wanted is None else [wanted]) or node.kwargs:
        expected = "no source" if wanted is None else f"the source {wanted.name!r}"
        raise MorphError(f"seed node {node.format_node()} must read {expected} besides its value and the state arrays")


def _behind_seeds(node: fx.Node, seeds: set[str]) -> fx.Node:
    """The value that a chain of seeds follows."""
    while node.op == "call_module" and node.target in seeds and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _made_from(value: fx.Node, source: fx.Node, seeds: set[str]) -> bool:
    """Whether a module's output was computed from a source: by a leaf from its first input, else the nearest first."""
    if value.op == "call_module":
        return any(_behind_seeds(node, seeds) is source for node in value.all_input_nodes[:1])
    seen = {value}
    waiting = deque([value])
    while waiting:
        node = waiting.popleft()
        if node is source:
            return True
        new = [following for following in node.all_input_nodes if following not in seen]
        seen.update(new)
        waiting += new
    return False


def _check_visits(site: str, visits: list[fx.Node], nodes: set[fx.Node]) -> None:
    """Every visit is a value of the graph."""
    for value in visits:
        if value not in nodes:
            raise MorphError(f"site {site!r} names {value.name!r}, which is not a node of the graph")


def _check_site(site: str, visits: list[fx.Node], target: str, calls: int, seeds: set[str]) -> None:
    """The site's seed, once, stands between every visit and all who use it."""
    if calls != len(visits):
        raise MorphError(f"site {site!r} is visited {len(visits)} times but its seed is called {calls} times")
    for value in visits:
        found = False
        node = value
        while any(_follows(user, node, seeds) for user in node.users):
            if len(node.users) != 1:
                others = sorted(user.name for user in node.users if not _follows(user, node, seeds))
                raise MorphError(f"users {others} of {node.name!r} at site {site!r} read past its seed")
            (node,) = node.users
            found = found or node.target == target
        if not found:
            raise MorphError(f"the seed of site {site!r} does not follow its value {value.name!r}")


def _follows(user: fx.Node, node: fx.Node, seeds: set[str]) -> bool:
    return user.target in seeds and user.args[0] is node
