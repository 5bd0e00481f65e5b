"""Trace a module's forward into a torch.fx graph, remembering what every submodule was given and returned."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from torch import fx, nn

from esper_fx.errors import MorphError
from esper_fx.passes.hazards import hazard
from esper_fx.passes.operations import operations
from esper_fx.passes.pipeline import Draft


class TraceError(MorphError):
    """A module's forward cannot be traced symbolically."""


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

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        function, arguments = super().create_args_for_root(*args, **kwargs)
        return function, [None if _name(value) in self._absent else value for value in arguments]

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        self.outputs.setdefault(self.path_of_module(m), []).append(result)
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy))
        self.inputs.setdefault(self.path_of_module(m), []).append(next(given, None))
        return result


def has_own_call(module: nn.Module) -> bool:
    """Whether hooks of the module would run at trace time instead of at run time."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def trace(draft: Draft) -> bool:
    """Trace ``draft.root`` and fill ``graph``, ``traced``, ``outputs`` and ``inputs``.

    Raises:
        TraceError: The forward cannot be traced symbolically, or its graph would not compute the same for every call; the
            message holds the reason.
    """
    kind = type(draft.root).__name__
    if type(draft.root).forward is nn.Module.forward:
        raise TraceError(f"{kind} has no forward: it only holds its parts")
    if (why := hazard(draft.root)) is not None:
        raise TraceError(f"{kind}.forward {why}")
    tracer = SiteTracer()
    graph = _trace(tracer, draft.root)
    if any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        raise TraceError(f"{kind}.forward makes a tensor of constants, which a graph would make only once")
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
    before = set(vars(root))
    try:
        return tracer.trace(root)
    except Exception as error:
        raise TraceError(f"{type(root).__name__} cannot be traced symbolically: {error}") from error
    finally:
        for name in set(vars(root)) - before:  # constants that the tracer leaves behind
            if name.startswith("_tensor_constant"):
                delattr(root, name)


def _optional(root: nn.Module) -> list[str]:
    """Parameters of the forward that may be left out, and are None then."""
    parameters = inspect.signature(root.forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is None]


def _name(value: Any) -> str:
    return str(value.node.target) if isinstance(value, fx.Proxy) else ""


def _node_of(value: Any) -> Any:
    return value.node if isinstance(value, fx.Proxy) else value
