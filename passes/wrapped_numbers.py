"""Numbers that Dynamo hands over as tensors, because they may vary: a graph reads each with ``item()``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from esper_fx.passes.carry_sizes import give_users


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
            give_users(item, number)
            graph.erase_node(item)
    return numbers
