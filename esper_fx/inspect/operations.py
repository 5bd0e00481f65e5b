"""The spliced graphs of a model as one networkx graph: every node of theirs, every value that goes from one to another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from esper_fx.inspect.records import SeedSummary
from esper_fx.morphing.branch import NAMESPACE
from esper_fx.morphing.original import original_kind
from esper_fx.morphing.scopes import is_seed
from esper_fx.passes.functions import address
from esper_fx.passes.names import join

if TYPE_CHECKING:
    import networkx as nx

    from esper_fx.model import MorphableModel


def add_operations(result: nx.MultiDiGraph, model: MorphableModel, seeds: Mapping[str, SeedSummary]) -> None:
    """Add every node of every spliced graph, and an edge for every argument that is a node."""
    for scope, graph in model.graphs.items():
        for node in graph.nodes:
            result.add_node(node_id(scope, node), **attributes(model, scope, node, seeds))
        for node in graph.nodes:
            for argument, producer in arguments(node):
                result.add_edge(node_id(scope, producer), node_id(scope, node), argument=argument)


def node_id(scope: str, node: fx.Node) -> str:
    """The node's name; in a part of a plain-Python model ``scope:name``. No two are equal: names hold no colon."""
    return f"{scope}:{node.name}" if scope else node.name


def attributes(model: MorphableModel, scope: str, node: fx.Node, seeds: Mapping[str, SeedSummary]) -> dict[str, Any]:
    """What the graph says of a node; JSON types only."""
    kind = node_kind(model, scope, node)
    found: dict[str, Any] = {
        "kind": kind,
        "op": node.op,
        "target": _target(scope, node),
        "scope": scope,
        "module": join(scope, module_path(node)),
    }
    if kind == "seed":
        return {**found, **seed_attributes(seeds[node.meta["esper_seed"]])}
    if node.op == "call_module":
        found["type"] = class_name(model, join(scope, str(node.target)))
    if node.op == "get_attr":
        value = _value(model, scope, str(node.target))
        if isinstance(value, torch.Tensor):
            found |= {"shape": [int(size) for size in value.shape], "dtype": str(value.dtype).removeprefix("torch.")}
    return found


def seed_attributes(seed: SeedSummary) -> dict[str, Any]:
    """What the graph says of a seed; its module is the one whose output its site is."""
    shape = None if seed.shape is None else list(seed.shape)
    return {
        "module": seed.site,
        "site": seed.site,
        "stage": seed.stage,
        "blueprint": seed.blueprint,
        "alpha": seed.alpha,
        "live": seed.live,
        "shape": shape,
        "dtype": seed.dtype,
    }


def node_kind(model: MorphableModel, scope: str, node: fx.Node) -> str:
    """What a node is to people: input, output, seed, module, operation, parameter, constant, or the seeds' state."""
    if node.op == "get_attr":
        if str(node.target).startswith(f"{NAMESPACE}."):
            return "state"
        return "parameter" if isinstance(_value(model, scope, str(node.target)), nn.Parameter) else "constant"
    if is_seed(node):
        return "seed"
    return {"placeholder": "input", "output": "output", "call_module": "module"}.get(node.op, "operation")


def module_path(node: fx.Node) -> str:
    """The innermost module that was being called when a node was traced, by its path in the scope; "" for the scope."""
    return next(reversed(module_calls(node)), "")


def module_calls(node: fx.Node) -> dict[str, str]:
    """The modules that were being called when a node was traced, outermost first: path in the scope to a name of the call."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    return {path: call for call, (path, _) in stack.items()}


def class_name(model: nn.Module, path: str) -> str:
    """Name of a module's class, as it was before morphing."""
    return original_kind(model.get_submodule(path)).__name__


def arguments(node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    """The nodes among a node's arguments, each with its position: ``0``, ``1[2]``, ``mask``, ``mask['left']``."""
    for position, value in enumerate(node.args):
        yield from _nodes_in(value, str(position))
    for name, value in node.kwargs.items():
        yield from _nodes_in(value, name)


def _nodes_in(value: Any, where: str) -> Iterator[tuple[str, fx.Node]]:
    if isinstance(value, fx.Node):
        yield where, value
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from _nodes_in(item, f"{where}[{position}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _nodes_in(item, f"{where}[{key!r}]")
    elif isinstance(value, slice):
        for part in ("start", "stop", "step"):
            yield from _nodes_in(getattr(value, part), f"{where}.{part}")


def _target(scope: str, node: fx.Node) -> str:
    if node.op == "call_function":
        kind: Any = node.target
        name = address(kind) or f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', kind)}"
        return name.removeprefix("_")  # operator.add says that it is of _operator
    target = str(node.target)
    qualified = node.op in ("call_module", "get_attr") and not target.startswith(f"{NAMESPACE}.")
    return join(scope, target) if qualified else target


def _value(model: nn.Module, scope: str, target: str) -> Any:
    """What a graph reads there, found without running anything: a parametrized tensor would be computed, so it is not."""
    root = scope if not target.startswith(f"{NAMESPACE}.") else ""
    path, _, name = join(root, target).rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return {**vars(module), **module._parameters, **module._buffers}.get(name)
