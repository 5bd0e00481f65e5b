"""Make modules plain: torch.fx.GraphModule in place of classes of esper_fx, so that nobody needs esper_fx to load them."""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer

from esper_fx._torch import PRESERVED_ATTRIBUTES
from esper_fx.errors import MorphError
from esper_fx.passes.hazards import hazard

_PACKAGE = "esper_fx"
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def is_ours(kind: type) -> bool:
    """Whether a class, or one that it derives from, is of esper_fx."""
    return any(_of_package(base) for base in kind.__mro__)


def become_graph_module(module: nn.Module, graph: fx.Graph, name: str) -> None:
    """Turn a module into a GraphModule of a graph, in place: parameters, buffers, submodules, attributes, hooks stay.

    Args:
        module: Holds all that the graph names.
        graph: What it computes from now on.
        name: Name of its class from now on.

    Raises:
        MorphError: Something in the module has a name that GraphModule uses itself; nothing has changed then.
    """
    shell = fx.GraphModule(nn.Module(), _nothing(), class_name=name)
    own = {key: value for key, value in vars(shell).items() if key not in _MODULE_ATTRIBUTES}
    reserved = (set(dir(fx.GraphModule)) | set(own)) - set(dir(nn.Module))
    taken = sorted(reserved & {*module._modules, *module._parameters, *module._buffers})
    if taken:
        raise MorphError(
            f"{name} has parts called {', '.join(taken)}, which is what torch.fx.GraphModule calls parts of its own; "
            "rename them to unmorph a model that keeps seeds there"
        )
    vars(module).update(own)
    for node in graph.nodes:
        _register_constant(module, node)
    module.__class__ = type(shell)
    assert isinstance(module, fx.GraphModule)
    module.graph = graph
    graph.lint()


def restore_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module a class that it has had before; a GraphModule gets one of its own again."""
    if not issubclass(kind, fx.GraphModule):
        module.__class__ = kind
        return
    module.__class__ = type(kind.__new__(kind))
    assert isinstance(module, fx.GraphModule)
    type(module).__name__ = kind.__name__
    module.graph = module.graph  # compiles the forward into the class


def residual(
    graph: fx.Graph,
    value: fx.Node,
    target: str,
    alpha: float,
    container: type | None = None,
    source: fx.Node | None = None,
) -> list[fx.Node]:
    """Add nodes for ``value + alpha * body(value)`` at the graph's insertion point; the last of them is the sum.

    Args:
        graph: The graph.
        value: A tensor, or a tuple or list whose first item it is.
        target: Qualified name of the body.
        alpha: A constant.
        container: The class of the tuple or list, None for a tensor. The other items are handed through.
        source: What the body reads instead of the value, None where it reads that.
    """
    nodes: list[fx.Node] = []

    def call(function: Callable[..., Any], *args: Any) -> fx.Node:
        nodes.append(graph.call_function(function, args))
        return nodes[-1]

    x = value if container is None else call(operator.getitem, value, 0)
    nodes.append(graph.call_module(target, (x if source is None else source,)))
    delta = nodes[-1]
    total = call(operator.add, x, delta if alpha == 1 else call(operator.mul, delta, alpha))
    if container is None:
        return nodes
    names = getattr(container, "_fields", None)
    if names:
        return [*nodes, graph.call_method("_replace", (value,), {names[0]: total})]
    rest = call(operator.getitem, value, slice(1, None))
    call(operator.add, [total] if issubclass(container, list) else (total,), rest)
    return nodes


def owner_of_hook(module: nn.Module) -> tuple[str, nn.Module]:
    """The module that the parameters of a hook can belong to, and its name in ``module``.

    That is the module itself; or, as what is added to a container would be one more item, the last in it that is none.

    Raises:
        MorphError: The container is empty.
    """
    names: list[str] = []
    while isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        items = [(name, item) for name, item in module._modules.items() if item is not None]
        if not items:
            raise MorphError(f"a seed on an empty {type(module).__name__} cannot be kept; prune it first")
        names.append(items[-1][0])
        module = items[-1][1]
    return ".".join(names), module


def add_residual_hook(
    module: nn.Module,
    owner: nn.Module,
    holder: str,
    name: str,
    body: nn.Module,
    alpha: float,
    container: type | None = None,
    source: bool = False,
) -> None:
    """Let a module return ``y + alpha * body(y)`` where its forward returns ``y``; for forwards that no graph can hold.

    torch.fx has no way to write ``f(*args, **kwargs)``, so this is a forward hook: a GraphModule, which is also the
    submodule ``holder`` of ``owner`` and has the body under ``name``. With ``source`` the body reads the module's first
    positional argument. The other arguments are those of `residual`.
    """
    graph = fx.Graph()
    _, args, y = (graph.placeholder(argument) for argument in ("module", "args", "y"))
    first = graph.call_function(operator.getitem, (args, 0)) if source else None
    graph.output(residual(graph, y, name, alpha, container, first)[-1])
    hook = nn.Module().train(module.training)
    hook.add_module(name, body)
    become_graph_module(hook, graph, "Residual")
    owner.add_module(holder, hook)
    module.register_forward_hook(hook)


def set_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Set a plain attribute that `copy.deepcopy` keeps, also where it is a GraphModule's."""
    setattr(module, name, value)
    if isinstance(module, fx.GraphModule):
        module.meta[PRESERVED_ATTRIBUTES] = {**module.meta.get(PRESERVED_ATTRIBUTES, {}), name: value}


def make_plain(body: nn.Module, site: str) -> None:
    """Turn every module of esper_fx in a body into a GraphModule, in place; a user's own modules stay as they are.

    Args:
        body: The body, or a copy.
        site: Where it sits, for messages.

    Raises:
        MorphError: One of them cannot be traced, or a module holds something of esper_fx in an attribute.
    """
    for path, module in list(body.named_modules()):
        kind = type(module)
        if not is_ours(kind):
            continue
        try:
            if (why := hazard(module)) is not None:
                raise MorphError(f"its forward {why}")
            become_graph_module(module, _record(module), kind.__name__)
        except Exception as error:
            raise MorphError(
                f"the body at site {site!r} contains a {kind.__name__}{_at(path)}, a class of esper_fx that cannot be "
                f"turned into a plain one: {error}. Derive from torch.nn.Module instead, or prune the seed first"
            ) from error
    for path, module in body.named_modules():
        for name, value in vars(module).items():
            found = None if name in ("_modules", "_parameters", "_buffers") else _of_ours_in(value)
            if found is not None:
                raise MorphError(
                    f"the body at site {site!r} holds {found} of esper_fx in attribute {name!r}{_at(path)}: nobody "
                    "could load it without esper_fx. Delete the attribute first, and copy what the body needs of it"
                )


def _at(path: str) -> str:
    return f" at {path!r}" if path else ""


def _nothing() -> fx.Graph:
    graph = fx.Graph()
    graph.output(None)
    return graph


def _register_constant(module: nn.Module, node: fx.Node) -> None:
    """A tensor attribute that a graph reads becomes a buffer, which is what torch.fx makes of it when it is loaded."""
    name = str(node.target)
    if node.op == "get_attr" and isinstance(vars(module).get(name), Tensor):
        module.register_buffer(name, vars(module).pop(name))


# Tracing, without torch.fx's own tracer: that patches nn.Module for every thread, and this may run beside training and
# beside the engine's thread.


def _record(module: nn.Module) -> fx.Graph:
    """The graph of a module's forward with one argument; its submodules are called as a whole."""
    graph = fx.Graph()
    tracer = _Tracer(graph)
    x = fx.Proxy(graph.placeholder("x"), tracer)
    result = type(module).forward(_Part(module, "", tracer), x)
    graph.output(tracer.create_arg(result))
    return graph


class _Tracer(GraphAppendingTracer):
    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            raise MorphError(f"a tensor of shape {list(a.shape)} in it is neither a parameter nor a buffer")
        return super().create_arg(a)


class _Part:
    """Stands for a module while its forward is recorded: submodules become calls, tensors become reads."""

    def __init__(self, module: nn.Module, path: str, tracer: _Tracer) -> None:
        self._esper = module, path, tracer

    def __getattr__(self, name: str) -> Any:
        module, path, tracer = self._esper
        value = getattr(module, name)
        target = f"{path}.{name}" if path else name
        if isinstance(value, nn.Module):
            return _Part(value, target, tracer)
        if name in module._parameters or name in module._buffers:
            return None if value is None else tracer.create_proxy("get_attr", target, (), {})
        if isinstance(value, types.MethodType) and value.__self__ is module:
            return types.MethodType(value.__func__, self)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _, path, tracer = self._esper
        return tracer.create_proxy("call_module", path, args, kwargs)

    def __iter__(self) -> Iterator[Any]:
        module = self._esper[0]
        return (getattr(self, name) for name in module._modules)

    def __len__(self) -> int:
        return len(self._esper[0]._modules)

    def __bool__(self) -> bool:
        return bool(self._esper[0])

    def __getitem__(self, index: Any) -> Any:
        names = list(self._esper[0]._modules)
        return getattr(self, index if isinstance(index, str) else names[index])


# Things of esper_fx in attributes.


def _of_package(what: Any) -> bool:
    module = getattr(what, "__module__", None)
    return isinstance(module, str) and module.partition(".")[0] == _PACKAGE


def _of_ours_in(value: Any) -> str | None:
    """Something of esper_fx in a value or in containers within it, in words, or None."""
    if isinstance(value, Tensor | nn.Module | fx.Graph):
        return None
    if isinstance(value, type | types.FunctionType):
        ours = is_ours(value) if isinstance(value, type) else _of_package(value)
        return value.__qualname__ if ours else None
    if isinstance(value, types.MethodType):
        return _of_ours_in(value.__func__) or _of_ours_in(value.__self__)
    if isinstance(value, functools.partial):
        return _of_ours_in((value.func, value.args, value.keywords))
    if is_ours(type(value)):
        return f"a {type(value).__name__}"
    if isinstance(value, dict):
        return _of_ours_in([*value.keys(), *value.values()])
    if isinstance(value, list | tuple | set | frozenset):
        return next(filter(None, map(_of_ours_in, value)), None)
    return None
