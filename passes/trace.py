"""Trace a module's forward into a torch.fx graph, remembering what every submodule was given and returned."""

from __future__ import annotations

import dataclasses
import inspect
import keyword
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from esper_fx.passes.effects import Attributes, Variables
from esper_fx.passes.hazards import has_own_dunder_call, hazard
from esper_fx.passes.names import variable
from esper_fx.passes.operations import operations
from esper_fx.passes.pipeline import Draft
from esper_fx.passes.values import TraceError, Value, is_value

__all__ = ["SiteTracer", "TraceError", "has_forward", "has_own_call", "trace"]

#: Containers that a graph makes as what they are. Besides these it can hold named tuples and plain dataclasses.
_CONTAINERS = (tuple, list, dict, torch.Size, immutable_list, immutable_dict)
#: What arguments mostly are: nothing of these can be lost.
_PLAIN = frozenset({*_CONTAINERS, Value, fx.Node, type(None), bool, int, float, str})


class SiteTracer(fx.Tracer):
    """Symbolic tracer that keeps library layers as leaves and notes what each submodule is given and returns.

    A module whose code tracing would misread (see ``hazards``) is kept as a leaf too.

    Args:
        absent: Parameters of the root's forward that are None while it is traced.
    """

    # Otherwise what the forward does to a buffer alone would be done while tracing, to the model's own, and never again.
    proxy_buffer_attributes = True

    def __init__(self, absent: Collection[str] = ()) -> None:
        super().__init__()
        self.outputs: dict[str, list[Any]] = {}
        self._absent = absent
        self.inputs: dict[str, list[Any]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or has_own_call(m) or hazard(m) is not None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value(node, self)

    def create_node(
        self,
        kind: str,
        target: fx.node.Target,
        args: tuple[fx.node.Argument, ...],
        kwargs: dict[str, fx.node.Argument],
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        return super().create_node(kind, target, args, kwargs, name or variable(target), type_expr)

    def create_arg(self, a: Any) -> fx.node.Argument:
        if type(a) not in _PLAIN and not is_value(a) and (lost := _lost(a)):
            raise TraceError(f"it makes a {type(a).__name__}, {lost}")
        return super().create_arg(a)

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        function, arguments = super().create_args_for_root(*args, **kwargs)
        return function, [None if _name(value) in self._absent else value for value in arguments]

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if has_own_dunder_call(type(m)):
            raise TraceError(f"{type(m).__name__} has a __call__ of its own, whose code a graph would hold twice")
        result = super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        self.outputs.setdefault(path, []).append(result)
        given = (value for value in (*args, *kwargs.values()) if is_value(value))
        self.inputs.setdefault(path, []).append(next(given, None))
        return result


def has_own_call(module: nn.Module) -> bool:
    """Whether hooks of the module would run at trace time instead of at run time."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_forward(module: nn.Module) -> bool:
    """Whether a module has a forward in Python, instead of only holding its parts."""
    return not isinstance(module, torch.jit.ScriptModule) and type(module).forward is not nn.Module.forward


def trace(draft: Draft) -> bool:
    """Trace ``draft.root`` and fill ``graph``, ``traced``, ``outputs`` and ``inputs``.

    Raises:
        TraceError: The forward cannot be traced symbolically, or its graph would not compute the same for every call; the
            message holds the reason.
    """
    kind = type(draft.root).__name__
    if (why := hazard(draft.root)) is not None:
        raise TraceError(f"{kind}.forward {why}")
    if not has_forward(draft.root):
        raise TraceError(f"{kind} has no forward: it only holds its parts")
    tracer = SiteTracer()
    graph = _trace(tracer, draft.root)
    if any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        raise TraceError(f"{kind}.forward makes a tensor of constants, which a graph would make only once")
    targets = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    if words := [target for target in targets if any(map(keyword.iskeyword, target.split(".")))]:
        raise TraceError(f"{kind} has a part called {words[0]!r}, which the code of a graph cannot spell")
    optional = _optional(draft.root)
    if optional:
        without = _trace(SiteTracer(absent=optional), draft.root)
        if operations(without, absent=optional) != operations(graph, absent=optional):
            names = " and ".join(optional)
            raise TraceError(f"{kind}.forward does different things where {names} is None, which a graph would freeze")
    draft.graph = graph
    draft.traced = operations(graph)
    draft.outputs = {
        name: [fx.node.map_aggregate(value, _node_of) for value in values] for name, values in tracer.outputs.items()
    }
    draft.outputs[""] = [next(iter(reversed(graph.nodes))).args[0]]
    draft.inputs = {
        name: [value.node if isinstance(value, fx.Proxy) else None for value in values]
        for name, values in tracer.inputs.items()
    }
    draft.inputs[""] = [next((node for node in graph.nodes if node.op == "placeholder"), None)]
    return True


def _trace(tracer: SiteTracer, root: nn.Module) -> fx.Graph:
    kind, names = type(root).__name__, set(vars(root))
    attributes, variables = Attributes(root), Variables(root)
    changed = ""
    try:
        graph = tracer.trace(root)
    except Exception as error:
        raise TraceError(f"{kind} cannot be traced symbolically: {error}") from error
    finally:
        for name in set(vars(root)) - names:  # constants that the tracer leaves behind
            if name.startswith("_tensor_constant"):
                delattr(root, name)
        changed = attributes.take_back() or variables.take_back(is_value)
    if changed:
        raise TraceError(f"{kind}.forward changes {changed}, which a graph would not")
    return graph


def _lost(value: Any) -> str:
    """What of a container a graph would lose, in words; empty if it would lose nothing."""
    kind = type(value)
    if isinstance(value, dict | list | tuple):
        kept = kind in _CONTAINERS or (isinstance(value, tuple) and hasattr(kind, "_fields"))
        return "" if kept else "whose class a graph would lose"
    if dataclasses.is_dataclass(kind):
        plain = kind.__dataclass_params__.init and not hasattr(kind, "__post_init__")  # type: ignore[attr-defined]
        plain = plain and all(field.init for field in dataclasses.fields(kind))
        return "" if plain else "whose fields do not say how it was made"
    return ""


def _optional(root: nn.Module) -> list[str]:
    """Parameters of the forward that may be left out, and are None then."""
    parameters = inspect.signature(root.forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is None]


def _name(value: Any) -> str:
    return str(value.node.target) if isinstance(value, fx.Proxy) else ""


def _node_of(value: Any) -> Any:
    return value.node if isinstance(value, fx.Proxy) else value
