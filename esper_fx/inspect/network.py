"""The graph of a morphed model for networkx: to analyse, to export, to draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from esper_fx.errors import InspectionError
from esper_fx.inspect.collect import seed_summaries
from esper_fx.inspect.modules import add_modules, readable_depth
from esper_fx.inspect.operations import add_operations, class_name, seed_attributes
from esper_fx.inspect.records import SeedSummary
from esper_fx.model import MorphableModel, morphed
from esper_fx.morphing.original import original_kind

if TYPE_CHECKING:
    import networkx as nx

DETAILS = ("modules", "operations")


def graph(model: nn.Module, *, detail: str = "modules", depth: int | None = None) -> nx.MultiDiGraph:
    """How values flow through a model: its spliced graphs, as one networkx graph without cycles, in order of execution.

    A node's identity is that of the (first) node of the spliced graph that it stands for: its name, or ``scope:name`` in a
    part of a model whose forward is plain Python. How values get from one such part to another is not known. A site whose
    module is not traced has two nodes, ``site:forward`` and ``site:seed``. Attributes of nodes are JSON types:

    - ``kind``: ``input``, ``output``, ``seed``, ``module``, ``operation``; with all operations also ``parameter``,
      ``constant`` and ``state``, which are the arrays that all seeds read;
    - ``op`` and ``target`` as in torch.fx, the target qualified; ``module``: path of the module that it belongs to, or
      that it is; ``scope``; ``type``: class of a module; ``operations``: how many a node stands for;
    - of seeds ``site``, ``stage``, ``blueprint``, ``alpha``, ``live``, and ``shape`` and ``dtype`` where known.

    An edge goes from what makes a value to what reads it: ``argument`` is the position there, such as ``0``, ``1[2]``
    or ``mask``; between modules ``value`` is the node that makes it.

    Args:
        model: A morphed model, or what `torch.compile` has made of one.
        detail: ``operations`` has every node of the spliced graphs; ``modules`` puts operations together by modules.
        depth: For ``modules``: modules whose paths have so many names are shown as a whole, so 2 shows ``blocks.0``.
            Default: as many as leave the graph readable.

    Raises:
        InspectionError: The model is not morphed, or there is no such detail or depth.
    """
    import networkx as nx

    found = morphed(model, "graph", InspectionError)
    if detail not in DETAILS:
        raise InspectionError(f"detail={detail!r}: expected one of {', '.join(map(repr, DETAILS))}")
    if depth is not None and (detail != "modules" or not isinstance(depth, int) or depth < 1):
        raise InspectionError(
            f"depth={depth!r} with detail={detail!r}: expected a whole number from 1, for 'modules' only"
        )
    result = nx.MultiDiGraph(model=original_kind(found).__name__, detail=detail, clock=found.clock)
    seeds = {seed.site: seed for seed in seed_summaries(found.growth)}
    if detail == "operations":
        add_operations(result, found, seeds)
    else:
        add_modules(result, found, seeds, depth or readable_depth(found))
    _add_untraced(result, found, seeds)
    return result


def as_graph(model_or_graph: nn.Module | nx.MultiDiGraph, caller: str) -> nx.MultiDiGraph:
    """What :func:`graph` has made, or makes now of a model.

    Raises:
        InspectionError: It is neither; the message names ``caller``.
    """
    import networkx as nx

    if isinstance(model_or_graph, nx.MultiDiGraph):
        missing = [node for node, kind in model_or_graph.nodes(data="kind") if kind is None]
        if missing:
            raise InspectionError(
                f"{caller}() was given a graph whose node {missing[0]!r} has no 'kind': expected a graph that "
                "esper_fx.inspect.graph has made, or a part of one"
            )
        return model_or_graph
    return graph(morphed(model_or_graph, caller, InspectionError))


def _add_untraced(result: nx.MultiDiGraph, model: MorphableModel, seeds: dict[str, SeedSummary]) -> None:
    """Sites whose module is plain Python are in no graph: the module, and the seed on what it returns."""
    drawn = {site for _, site in result.nodes(data="site")}
    for site in [name for name in seeds if name not in drawn]:
        common = {"op": "call_module", "target": site, "scope": site, "module": site}
        result.add_node(f"{site}:forward", kind="module", **common, type=class_name(model, site))
        result.add_node(f"{site}:seed", **{"kind": "seed", **common, **seed_attributes(seeds[site])})
        result.add_edge(f"{site}:forward", f"{site}:seed", argument="0")
