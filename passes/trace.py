"""Trace a module's forward into a torch.fx graph, remembering what every submodule was given and returned."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from esper_fx.errors import MorphError
from esper_fx.passes.pipeline import Draft


class TraceError(MorphError):
    """A module's forward cannot be traced symbolically."""


class SiteTracer(fx.Tracer):
    """Symbolic tracer that keeps library layers as leaves and notes what each submodule is given and returns.

    A module of the user's own whose forward reads ``self.training`` is kept as a leaf too: symbolic tracing would freeze
    the branch of the mode it was traced in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, list[Any]] = {}
        self.inputs: dict[str, list[Any]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or has_own_call(m) or reads_training(m)

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


def reads_training(module: nn.Module) -> bool:
    """Whether the module's own forward looks at ``self.training``."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names


def trace(draft: Draft) -> bool:
    """Trace ``draft.root`` and fill ``graph``, ``original``, ``outputs`` and ``inputs``.

    Raises:
        TraceError: The forward cannot be traced symbolically; the message holds the reason.
    """
    if reads_training(draft.root):
        raise TraceError(f"{type(draft.root).__name__}.forward reads self.training, which a graph would freeze")
    tracer = SiteTracer()
    try:
        graph = tracer.trace(draft.root)
    except Exception as error:
        raise TraceError(f"{type(draft.root).__name__} cannot be traced symbolically: {error}") from error
    draft.graph = graph
    draft.original = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = draft.original.graph_copy(graph, mapping)
    output = next(iter(reversed(graph.nodes)))
    draft.original.output(result, type_expr=output.type)
    draft.outputs = {
        name: [value.node if isinstance(value, fx.Proxy) else value for value in values]
        for name, values in tracer.outputs.items()
    }
    draft.outputs[""] = [output.args[0]]
    draft.inputs = {
        name: [value.node if isinstance(value, fx.Proxy) else None for value in values]
        for name, values in tracer.inputs.items()
    }
    draft.inputs[""] = [next((node for node in graph.nodes if node.op == "placeholder"), None)]
    return True
