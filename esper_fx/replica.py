"""Copies of module trees that share every tensor with what they are copies of."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx, nn


def replica(net: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a module tree that shares parameters, buffers and other tensor attributes.

    Args:
        net: The tree.
        memo: As for `copy.deepcopy`: objects, by identity, that stand for others in the copy. It is filled, so that
            a second tree can be copied with the same.
    """
    memo = {} if memo is None else memo
    graph_modules = []
    for module in net.modules():
        for value in (*vars(module).values(), *module._parameters.values(), *module._buffers.values()):
            if isinstance(value, Tensor):
                memo[id(value)] = value
        if isinstance(module, fx.GraphModule) and id(module) not in memo:
            # Its own way of copying itself loses attributes, hooks and which buffers are not for a state_dict.
            memo[id(module)] = type(module).__new__(type(module))
            graph_modules.append(module)
    result: nn.Module = copy.deepcopy(net, memo)
    for module in graph_modules:
        twin = memo[id(module)]
        vars(twin).update(copy.deepcopy(vars(module), memo))
        type(twin).__name__ = type(module).__name__
        twin.graph = twin.graph  # compiles the forward into the copy's own class
    return result
