"""Give the nodes of a region their fake values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from esper_fx.passes.metas import InputMeta, Symbols, TensorMeta
from esper_fx.passes.propagate import propagate


def annotate(
    module: fx.GraphModule, inputs: Sequence[InputMeta | int], symbols: Symbols | None = None
) -> tuple[TensorMeta, ...]:
    """Give every node a fake value and return what the graph's outputs are; the ambient state must be set.

    Args:
        module: The region.
        inputs: What its placeholders are; a number stands for itself.
        symbols: What sizes that vary are made of. Default: new ones.
    """
    symbols = symbols or Symbols.of(inputs)
    with symbols.active():
        propagate(module, symbols.examples(inputs))
    output = next(iter(reversed(module.graph.nodes)))
    values = [node.meta["example_value"] for node in output.args[0]]
    return tuple(TensorMeta.of(value) for value in values)
