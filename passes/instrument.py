"""Put probes at the sites of a region, whose seeds are still unresolved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from esper_fx.ops.probe import site_gradient, site_sensor, site_values
from esper_fx.passes.propagate import is_seed, seed_operands


def instrument(template: fx.Graph, gradients: Sequence[bool], sensors: Sequence[int | None] = ()) -> fx.Graph:
    """Copy ``template`` with a probe at every seed.

    The copy has more placeholders, after the others: the leaf for what backward passes measure, and for each sensor one for
    its sketch. It has one output more, the last: what was measured of the values at its sites. See :mod:`esper_fx.ops.probe`
    for their shapes.

    Args:
        template: A graph with at least one seed.
        gradients: For each seed whether the gradient at its site is measured too. Not where the value is changed in place
            later: autograd refuses that for what a probe hands through.
        sensors: Nothing, or for each seed the dimension that holds features, or None: where there is one and the gradient is
            measured, there is a sensor.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(template, {}))
    nodes = list(graph.nodes)
    with graph.inserting_before(next(node for node in nodes if node.op != "placeholder")):
        leaf = graph.placeholder("probe")
        sketches = [
            graph.placeholder(f"sketch{i}") if gradients[i] and dim is not None else None
            for i, dim in enumerate(sensors)
        ]
    rows: list[fx.Node] = []
    for node in filter(is_seed, nodes):
        x, _ = seed_operands(node)
        users, row = list(node.users), len(rows)
        with graph.inserting_before(node.next):
            rows.append(graph.call_function(site_values, (x, node)))
            if gradients[row]:
                through = graph.call_function(site_gradient, (node, x, leaf, row))
                if sensors and sensors[row] is not None:
                    through = graph.call_function(site_sensor, (through, x, sketches[row], sensors[row]))
                for user in users:
                    user.replace_input_with(node, through)
    output = nodes[-1]
    with graph.inserting_before(output):
        table = graph.call_function(torch.stack, (rows,))
    output.args = ((*output.args[0], table),)
    graph.lint()
    return graph
