"""Turn a region's template into a variant: dormant seeds vanish, live ones become their body."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from esper_fx.ops import seed_input, seed_output
from esper_fx.passes.propagate import is_seed, seed_operands
from esper_fx.passes.record import BodyGraph


def specialize(template: fx.Graph, bodies: Sequence[BodyGraph | None]) -> fx.Graph:
    """Copy ``template`` with its seeds resolved.

    The new graph's placeholders are the template's, then for each live seed, in order: alpha and gate (0-dim) and the
    tensors of its body.

    Args:
        template: A graph whose seed nodes, in order, belong to ``bodies``.
        bodies: For each seed node its recorded body, or None where the seed is dormant.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    body_inputs: list[list[fx.Node]] = []
    placeholders = [node for node in template.nodes if node.op == "placeholder"]
    for node in placeholders:
        mapping[node] = graph.placeholder(node.name)
    for slot, body in enumerate(bodies):
        names = () if body is None else ("alpha", "gate", *body.names)
        body_inputs.append([graph.placeholder(f"seed{slot}_{name.replace('.', '_')}") for name in names])
    slot = 0
    for node in template.nodes:
        if node.op == "placeholder":
            continue
        if is_seed(node):
            value, source = (None if n is None else mapping[n] for n in seed_operands(node))
            assert value is not None
            body = bodies[slot]
            mapping[node] = value if body is None else _inline(graph, value, source, body, body_inputs[slot])
            slot += 1
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.lint()
    return graph


def _inline(graph: fx.Graph, x: fx.Node, source: fx.Node | None, body: BodyGraph, inputs: list[fx.Node]) -> fx.Node:
    alpha, gate, *tensors = inputs
    inner = graph.call_function(seed_input, (source if body.reads_source else x, alpha, gate))
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    mapping: dict[fx.Node, fx.Node] = dict(zip(placeholders, [inner, *tensors], strict=True))
    delta = graph.graph_copy(body.graph, mapping)
    return graph.call_function(seed_output, (x, delta, alpha))
