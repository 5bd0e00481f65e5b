"""Find good sites by the flow of data: block outputs and residual streams, which everything before must pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import nn

from esper_fx.passes.flow import Flow

#: How many sites there are at most, unless the caller says otherwise.
MAX_SITES = 32
#: With fewer sites than this, what lies between two of them is looked into.
_FEW = 2
_SINK = -1


@dataclass(frozen=True)
class _Candidate:
    """A module whose every value is one that all paths from some source to the output pass."""

    name: str
    nodes: tuple[int, ...]


def auto_sites(flow: Flow, modules: Mapping[str, nn.Module], max_sites: int = MAX_SITES) -> list[str]:
    """Names of modules at whose outputs new modules are worth trying, in the order they run.

    The work begins at the first operations that cost something (the sources). A value is a candidate if every path from
    a source to the model's output passes it: it post-dominates the source, so it cuts the flow in two; sums that end
    residual branches do, what lies inside a branch does not. Masks and tables that are computed beside the flow do not
    matter. Of the candidates that are a module's output, those count which have work before them and work after
    them; where several modules return the same value or contain each other, the kind of module that there are most
    of on the path goes first (blocks rather than stages or layers). If fewer than two are found, the largest stretch
    between two of them is looked into in the same way, its shortcuts left out. Beyond ``max_sites``, those are kept
    that divide the work most evenly.

    Args:
        flow: The model's flow of data.
        modules: Its modules by qualified name.
        max_sites: The most to return.

    Returns:
        The names; the same for the same flow. Empty where there is no candidate.
    """
    graph = flow.graph.copy()
    graph.add_node(_SINK, work=0.0)
    graph.add_edges_from((output, _SINK) for output in flow.outputs)
    graph.remove_nodes_from(set(graph) - nx.ancestors(graph, _SINK) - {_SINK})
    path = _passed(graph, set(graph), _SINK)
    found = _named(flow, modules, graph, path)
    while len(found) < _FEW:
        more = _inside_the_largest(graph, path)
        if more <= path:
            break
        path |= more
        found = _named(flow, modules, graph, path)
    return [candidate.name for candidate in _evenly(graph, found, max_sites)]


def _passed(graph: nx.DiGraph, region: set[int], end: int) -> set[int]:
    """The nodes of a region that every path from one of its sources to ``end`` passes."""
    part = graph.subgraph(region | {end})
    behind = nx.immediate_dominators(part.reverse(copy=False), end)
    passed: set[int] = set()
    for source in _sources(part):
        node: int | None = source
        while node is not None and node != end and node not in passed:
            passed.add(node)
            node = behind.get(node)
    return passed


def _sources(part: nx.DiGraph) -> list[int]:
    """The nodes with work that no work comes before."""
    after: set[int] = set()
    sources = []
    for node in sorted(part):
        if node in after:
            after.update(part.successors(node))
        elif part.nodes[node]["work"] > 0:
            sources.append(node)
            after.update(part.successors(node))
    return sources


def _named(flow: Flow, modules: Mapping[str, nn.Module], graph: nx.DiGraph, path: set[int]) -> list[_Candidate]:
    """The modules whose values lie on the path, one for each stretch of work, in order."""
    candidates = [
        _Candidate(name, tuple(nodes))
        for name, nodes in flow.modules.items()
        if name in modules and not _is_container(modules[name]) and all(node in path for node in nodes)
    ]
    before, inner = _inner(graph)
    candidates = [
        candidate
        for candidate in candidates
        if all(node in inner for node in candidate.nodes) and _as_many_features(flow, candidate.nodes)
    ]
    kinds: dict[type[nn.Module], tuple[int, int]] = {}
    for candidate in candidates:
        joins, count = kinds.get(type(modules[candidate.name]), (0, 0))
        joins += _ends_branches(graph, candidate.nodes[0], before)
        kinds[type(modules[candidate.name])] = joins, count + 1
    taken: dict[str, _Candidate] = {}
    values: set[int] = set()
    own = [candidate for candidate in candidates if not _of_a_library(modules[candidate.name])]
    blocks = _choose(own, kinds, modules, taken, values)
    if blocks >= _FEW:
        return sorted(taken.values(), key=lambda candidate: candidate.nodes)
    _choose([c for c in candidates if _of_a_library(modules[c.name])], kinds, modules, taken, values)
    return _one_a_stretch(flow, graph, sorted(taken.values(), key=lambda candidate: candidate.nodes))


def _as_many_features(flow: Flow, nodes: Sequence[int]) -> bool:
    """Whether the values of a module that is called several times can have one body: the same sizes where features may be."""
    shapes = [shape for shape in map(flow.shapes.get, nodes) if shape is not None]
    return len({(len(shape), shape[1:2] if len(shape) > 3 else None, shape[-1:]) for shape in shapes}) <= 1


def _choose(
    candidates: Iterable[_Candidate],
    kinds: Mapping[type[nn.Module], tuple[int, int]],
    modules: Mapping[str, nn.Module],
    taken: dict[str, _Candidate],
    values: set[int],
) -> int:
    """Take the kinds that end most branches first, then what is outermost; nothing inside or around what is taken."""

    def rank(candidate: _Candidate) -> tuple[Any, ...]:
        joins, count = kinds[type(modules[candidate.name])]
        return -joins, -count, candidate.name.count("."), candidate.nodes, candidate.name

    for candidate in sorted(candidates, key=rank):
        related = any(_related(candidate.name, other) for other in taken)
        if not related and values.isdisjoint(candidate.nodes):
            taken[candidate.name] = candidate
            values.update(candidate.nodes)
    return len(taken)


def _related(one: str, other: str) -> bool:
    return one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _one_a_stretch(flow: Flow, graph: nx.DiGraph, candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Of layers that follow each other without work in between, the last whose value has the first one's shape."""
    kept: list[_Candidate] = []
    for candidate in candidates:
        first = candidate.nodes[0]
        before = kept[-1].nodes[-1] if kept else None
        if before is None or _work_between(graph, before, first) > 0:
            kept.append(candidate)
        elif flow.shapes.get(before) == flow.shapes.get(first):
            kept[-1] = candidate
    return kept


def _work_between(graph: nx.DiGraph, before: int, after: int) -> float:
    between = nx.ancestors(graph, after) - nx.ancestors(graph, before) - {before}
    return float(sum(graph.nodes[node]["work"] for node in (*between, after)))


def _ends_branches(graph: nx.DiGraph, node: int, before: Mapping[int, bool]) -> bool:
    """Whether a value is a sum of branches, or comes of one without work in between."""
    while True:
        data = [source for source in graph.predecessors(node) if before[source]]
        if len(data) != 1:
            return len(data) > 1
        if graph.nodes[node]["work"] > 0:
            return False
        node = data[0]


def _inner(graph: nx.DiGraph) -> tuple[dict[int, bool], set[int]]:
    """For each node whether it has work before it or of its own; and the nodes that have work after them as well."""
    before: dict[int, bool] = {}
    after: dict[int, bool] = {}
    order = sorted(node for node in graph if node != _SINK)
    for node in order:
        works = graph.nodes[node]["work"] > 0
        before[node] = works or any(before[source] for source in graph.predecessors(node))
    for node in reversed(order):
        users = [user for user in graph.successors(node) if user != _SINK]
        after[node] = any(after[user] or graph.nodes[user]["work"] > 0 for user in users)
    return before, {node for node in order if before[node] and after[node]}


def _inside_the_largest(graph: nx.DiGraph, path: set[int]) -> set[int]:
    """What every path through the largest stretch between two nodes of the path passes, shortcuts left out."""
    nearest: dict[int, int] = {_SINK: _SINK}
    work: Counter[int] = Counter()
    stretches: dict[int, set[int]] = {}
    for node in sorted((n for n in graph if n != _SINK), reverse=True):
        ends = {user if user in path else nearest[user] for user in graph.successors(node)}
        nearest[node] = min(ends - {_SINK}, default=_SINK)
        if node not in path:
            stretches.setdefault(nearest[node], set()).add(node)
            work[nearest[node]] += graph.nodes[node]["work"]
    for end, amount in sorted(work.items(), key=lambda item: (-item[1], item[0])):
        if amount > 0:
            more = _passed(graph, stretches[end], end)
            if more:
                return more
    return set()


def _evenly(graph: nx.DiGraph, candidates: list[_Candidate], most: int) -> list[_Candidate]:
    """At most so many, each where a further equal share of the work is done."""
    if len(candidates) <= most:
        return candidates
    done: list[float] = []
    total = 0.0
    numbers = sorted(node for node in graph if node != _SINK)
    position = 0
    for candidate in candidates:
        while position < len(numbers) and numbers[position] <= candidate.nodes[-1]:
            total += graph.nodes[numbers[position]]["work"]
            position += 1
        done.append(total)
    kept: list[_Candidate] = []
    for share in range(1, most + 1):
        rest = [i for i in range(len(candidates)) if candidates[i] not in kept]
        best = min(rest, key=lambda i: (abs(done[i] - done[-1] * share / most), i))
        kept.append(candidates[best])
    return sorted(kept, key=lambda candidate: candidate.nodes)


def _is_container(module: nn.Module) -> bool:
    return type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity)


def _of_a_library(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn")
