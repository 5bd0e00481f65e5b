"""Send a graph of PyTorch functions to another process.

torch.fx pickles a GraphModule as source text and traces that text symbolically when it is read back, which inlines Python
functions that must stay whole, such as the ones whose gradient is not that of their forward. This writes the nodes down.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx, nn

from esper_fx.passes.functions import address, resolve
from esper_fx.passes.user_kernels import NUMBERS, kernel_call, numbers_of


@dataclass(frozen=True)
class _NodeAt:
    """Stands for a node in pickled arguments."""

    index: int


@dataclass(frozen=True)
class _FunctionAt:
    """Stands for a function: pickle does not find all of them by their own names."""

    path: str


@dataclass(frozen=True)
class _KernelAt:
    """Stands for a Triton kernel of the user's own and for what it is called with."""

    path: str
    constants: dict[str, Any]


def _sendable(target: Any) -> Any:
    path = None if isinstance(target, str) else address(target)
    return target if path is None else _FunctionAt(path)


def _place(index: dict[fx.Node, int], node: fx.Node) -> Any:
    return _NodeAt(index[node])


def dumps(module: fx.GraphModule) -> bytes:
    """Serialise the graph and the attributes it reads; nodes lose their metadata.

    Raises:
        Exception: Whatever pickle raises for a target or an argument that cannot be sent.
    """
    index: dict[fx.Node, int] = {}
    rows = []
    attributes: dict[str, Any] = {}
    for node in module.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), partial(_place, index))
        call = kernel_call(node)
        if call is not None:
            kwargs = {**kwargs, NUMBERS[0]: _KernelAt(call.path, call.constants)}
        rows.append((node.op, node.name, _sendable(node.target), args, kwargs))
        index[node] = len(index)
        if node.op == "get_attr":
            value: Any = module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            attributes[str(node.target)] = dumps(value) if isinstance(value, fx.GraphModule) else value
    return pickle.dumps((rows, attributes))


def loads(data: bytes) -> fx.GraphModule:
    """Read back what :func:`dumps` wrote. Executes code: only for data from a process of ours."""
    rows, attributes = pickle.loads(data)
    root = nn.Module()
    for name, value in attributes.items():
        setattr(root, name, loads(value) if isinstance(value, bytes) else value)
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def restore(value: Any) -> Any:
        if isinstance(value, _NodeAt):
            return nodes[value.index]
        if isinstance(value, list | tuple):
            items = [restore(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, dict):
            return {key: restore(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(restore(value.start), restore(value.stop), restore(value.step))
        return value

    for op, name, target, args, kwargs in rows:
        if op == "placeholder":
            nodes.append(graph.placeholder(name))
        elif op == "output":
            nodes.append(graph.output(restore(args[0])))
        else:
            function = resolve(target.path) if isinstance(target, _FunctionAt) else target
            kernel = kwargs.get(NUMBERS[0])
            numbers = numbers_of(kernel.path, kernel.constants) if isinstance(kernel, _KernelAt) else {}
            nodes.append(graph.create_node(op, function, restore(args), {**restore(kwargs), **numbers}, name))
    return fx.GraphModule(root, graph)
