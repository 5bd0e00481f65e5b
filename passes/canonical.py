"""Describe a graph without the names of its nodes, so that equal graphs have equal descriptions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from esper_fx.passes.functions import address
from esper_fx.passes.user_kernels import NUMBERS, kernel_call


def canonical(graph: fx.Graph, owner: nn.Module | None = None, skip: Callable[[fx.Node], bool] | None = None) -> str:
    """Return a JSON text that holds operators, topology, constants and attributes, and no node names.

    Args:
        graph: The graph to describe.
        owner: The module that ``get_attr`` nodes read from; needed only where there are such nodes.
        skip: Nodes to leave out, such as inputs that the description should not depend on.

    Raises:
        TypeError: An argument has a type whose identity cannot be described.
    """
    index: dict[fx.Node, int] = {}
    rows = []
    for node in graph.nodes:
        if skip is not None and skip(node):
            continue
        call, kwargs = kernel_call(node), dict(node.kwargs)
        if call is not None:
            kwargs |= dict(zip(NUMBERS, (call.describe(), None), strict=True))
        rows.append([node.op, _target(node, owner), _describe(node.args, index), _describe(kwargs, index)])
        index[node] = len(index)
    return json.dumps(rows, separators=(",", ":"))


def digest(text: str) -> str:
    """Sha256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def qualified_name(function: Any) -> str:
    """A name for a callable that is stable between processes and that no other callable has.

    Raises:
        TypeError: There is none, as for a lambda.
    """
    name = address(function)
    if name is None:
        raise TypeError(f"{function!r} has no address: another process could not find it")
    return name


def _target(node: fx.Node, owner: nn.Module | None) -> Any:
    if node.op in ("placeholder", "output"):
        return ""
    if node.op == "get_attr":
        return _attribute(owner, str(node.target))
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_module":
        raise TypeError(f"node {node.name} calls module {node.target!r}: a region graph has no modules")
    return qualified_name(node.target)


def _attribute(owner: nn.Module | None, target: str) -> Any:
    value: Any = owner
    for part in target.split("."):
        value = getattr(value, part)
    if isinstance(value, fx.GraphModule):
        return ["graph", canonical(value.graph, value)]
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        content = hashlib.sha256(data).hexdigest()
        return ["tensor", str(value.dtype), list(value.shape), list(value.stride()), str(value.device), content]
    return _describe(value, {})


def _describe(value: Any, index: dict[fx.Node, int]) -> Any:
    """A JSON value that tells apart everything that changes what the graph computes, types included."""
    if isinstance(value, fx.Node):
        return ["%", index.get(value, -1)]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return ["int", value]
    if isinstance(value, float):
        return ["float", value.hex()]
    if isinstance(value, complex):
        return ["complex", value.real.hex(), value.imag.hex()]
    if isinstance(value, tuple | list):
        return [type(value).__name__, *(_describe(item, index) for item in value)]
    if isinstance(value, dict):
        return ["dict", *([_describe(key, index), _describe(item, index)] for key, item in value.items())]
    if isinstance(value, slice):
        return ["slice", *(_describe(item, index) for item in (value.start, value.stop, value.step))]
    if isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format) or value is Ellipsis:
        return [type(value).__name__, str(value)]
    if callable(value):
        return ["callable", qualified_name(value)]
    raise TypeError(f"cannot describe a graph argument of type {type(value).__name__}: {value!r}")
