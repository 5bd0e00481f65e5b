"""Compute all sizes in a program out of its integer inputs, so that any part of it can do so on its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from esper_fx.passes.metas import Size, evaluate
from esper_fx.passes.propagate import level_change

#: Marks the nodes that compute sizes; those that something else reads have their `Size` there, the others None.
SIZE = "esper_size"


class SizesError(Exception):
    """Something cannot be said of all sizes at once."""


def carry_sizes(graph: fx.Graph) -> bool:
    """Replace every annotated node whose value is a number: by a constant, or by nodes at the graph's beginning.

    Where sizes vary, these compute it out of the integer inputs. Returns whether there was any.

    Raises:
        SizesError: A number does not follow from the integer inputs.
    """
    carrier, changed = _Carrier(graph), False
    numbers = [node for node in graph.nodes if _is_number(node)]
    for node in numbers:
        number = carrier.carried(node.meta["example_value"])
        changed |= bool(node.users) or node.op != "placeholder"
        give_users(node, number)
    for node in reversed(numbers):
        if node.op != "placeholder":
            graph.erase_node(node)
    return changed


def _is_number(node: fx.Node) -> bool:
    """Whether a node's value is a number that others should not take from it."""
    value = node.meta.get("example_value")
    if node.op == "output" or level_change(node) or SIZE in node.meta:
        return False
    varying = isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) and node.op != "placeholder"
    return varying or isinstance(value, int | float | torch.Size)


def give_users(node: fx.Node, number: Any) -> None:
    """Let all that read a node read a number instead: a constant, or a tuple of constants and nodes, or a node."""
    replace = partial(_replaced, node, number)
    for user in list(node.users):
        user.args = fx.map_arg(user.args, replace)
        user.kwargs = fx.map_arg(user.kwargs, replace)


def _replaced(node: fx.Node, number: Any, other: fx.Node) -> Any:
    return number if other is node else other


class _Carrier:
    """Makes the nodes that compute sizes, each once."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._first = next(node for node in graph.nodes if node.op != "placeholder")
        tracer = GraphAppendingTracer(graph)
        self._inputs: dict[str, fx.Proxy] = {}
        self._made: dict[str, fx.Node] = {}
        for node in graph.nodes:
            size = Size.of(node.meta.get("example_value")) if node.op == "placeholder" else None
            if isinstance(size, Size):
                self._inputs[size.text] = fx.Proxy(node, tracer)
                self._made[size.text] = node

    def carried(self, value: Any) -> Any:
        """A number as an argument of nodes: itself where it is fixed, else what computes it."""
        if isinstance(value, torch.Size):
            return tuple(map(self.carried, value))
        size = Size.of(value)
        if not isinstance(size, Size):
            return size
        if size.text not in self._made:
            self._made[size.text] = self._compute(size)
        return self._made[size.text]

    def _compute(self, size: Size) -> fx.Node:
        before = set(self._graph.nodes)
        with self._graph.inserting_before(self._first):
            try:
                node = evaluate(size.text, self._inputs).node
            except Exception as error:
                raise SizesError(
                    f"size {size.text} does not follow from the program's integer inputs: {error}"
                ) from error
        for other in set(self._graph.nodes) - before:
            other.meta[SIZE] = None
        node.meta[SIZE] = size
        assert isinstance(node, fx.Node)
        return node
