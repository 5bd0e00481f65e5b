"""A model's graph as JSON, in the node-link form of networkx."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torch import nn

from esper_fx.inspect.network import as_graph

if TYPE_CHECKING:
    import networkx as nx


def to_json(model_or_graph: nn.Module | nx.MultiDiGraph) -> str:
    """The graph as strict JSON, which ``networkx.node_link_graph(json.loads(text), edges="edges")`` reads back.

    What is not known is null; there is no NaN and no infinity.

    Args:
        model_or_graph: What :func:`graph` has made, or a morphed model, of which it then makes one.

    Raises:
        InspectionError: It is neither.
    """
    graph = as_graph(model_or_graph, "to_json")
    # Written out here, because networkx calls the list of edges otherwise in some versions.
    document: dict[str, Any] = {
        "directed": graph.is_directed(),
        "multigraph": graph.is_multigraph(),
        "graph": graph.graph,
        "nodes": [{**attributes, "id": node} for node, attributes in graph.nodes(data=True)],
        "edges": [
            {**attributes, "source": source, "target": target, "key": key}
            for source, target, key, attributes in graph.edges(keys=True, data=True)
        ],
    }
    return json.dumps(document, indent=1, allow_nan=False)
