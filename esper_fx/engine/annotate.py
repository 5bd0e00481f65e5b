"""Give the nodes of a region their fake values."""

from __future__ import annotations

from torch import fx

from esper_fx import _torch
from esper_fx.passes.propagate import propagate
from esper_fx.passes.record import TensorMeta


def annotate(module: fx.GraphModule, inputs: tuple[TensorMeta, ...]) -> tuple[TensorMeta, ...]:
    """Give every node a fake value and return what the graph's outputs are; the ambient state must be set."""
    with _torch.FakeTensorMode(allow_non_fake_inputs=True):
        propagate(module, [meta.empty() for meta in inputs])
    output = next(iter(reversed(module.graph.nodes)))
    values = [node.meta["example_value"] for node in output.args[0]]
    return tuple(TensorMeta.of(value) for value in values)
