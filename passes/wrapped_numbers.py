"""Numbers that Dynamo hands over as tensors, because they may vary: a graph reads each with ``item()``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, fx


def wrapped_numbers(graph: fx.Graph) -> tuple[int, ...]:
    """The places, among a graph's inputs, of tensors that it only reads a number from."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return tuple(place for place, node in enumerate(placeholders) if _is_wrapped(node))


def _is_wrapped(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    reads = bool(node.users) and all(user.op == "call_method" and user.target == "item" for user in node.users)
    return reads and isinstance(value, Tensor) and value.ndim == 0


def unwrap_numbers(graph: fx.Graph, args: Sequence[Any]) -> dict[int, Any]:
    """Put those numbers into a graph as constants.

    Args:
        graph: It.
        args: What it is called with.

    Returns:
        For each place of one the number.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    numbers = {place: args[place].item() for place in wrapped_numbers(graph)}
    for place, number in numbers.items():
        for item in list(placeholders[place].users):
            replace = partial(_replaced, item, number)
            for user in list(item.users):
                user.args = fx.map_arg(user.args, replace)
                user.kwargs = fx.map_arg(user.kwargs, replace)
            graph.erase_node(item)
    return numbers


def _replaced(node: fx.Node, number: Any, other: fx.Node) -> Any:
    return number if other is node else other
