"""Record what a module does to a tensor as a torch.fx graph, without symbolic tracing and without touching the module.

torch.fx's own tracer patches nn.Module for the whole process while it runs, so a training thread that happens to call a
compiled model meanwhile fails. This recorder is thread-local: it runs a copy of the module on fake tensors under a torch
function mode and writes down every PyTorch function that is called.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer
from torch.overrides import TorchFunctionMode

from esper_fx._torch import SET_GRAD_ENABLED, pytree
from esper_fx.errors import BlueprintError
from esper_fx.ops import reads_source
from esper_fx.passes.canonical import canonical, digest
from esper_fx.passes.functions import tensor_methods
from esper_fx.passes.metas import Size, Symbols, TensorMeta, evaluate


@dataclass(frozen=True, eq=False)
class BodyGraph:
    """A module as a graph: placeholders are its input and then its tensors, the output is one value.

    Attributes:
        graph: PyTorch functions and methods only.
        names: Qualified names of the module's parameters and then buffers, in the order of the placeholders after the first.
        tensors: What those tensors are.
        output: What the graph returns.
        identity: Digest of the graph and of all tensors' descriptions; equal for bodies that compile to the same code.
        reads_source: Whether the input is the source of the site's value instead of the value itself.
        guards: What has to be true of the names of the input's sizes for the graph to be what the module does.
    """

    graph: fx.Graph
    names: tuple[str, ...]
    tensors: tuple[TensorMeta, ...]
    output: TensorMeta
    identity: str
    reads_source: bool = False
    guards: tuple[str, ...] = ()


def record(module: nn.Module, x: TensorMeta, *, training: bool) -> BodyGraph:
    """Record ``module(x)`` as a graph whose parameters and buffers are inputs.

    Args:
        module: The module; a copy of it runs, on fake tensors, so nothing of it changes.
        x: Description of its input: the value at the site, or that value's source where the module says that it reads it.
        training: The mode to record in.

    Raises:
        BlueprintError: The module did something that a graph cannot hold (a custom autograd function, control flow that
            depends on values), or did not return one tensor.
    """
    name = type(module).__name__
    tensors = _tensors(module)
    metas = tensor_metas(module)
    graph = fx.Graph()
    try:
        symbols = Symbols(x.names, beside_real=False)
        with torch.inference_mode(False), torch.enable_grad(), symbols.active():
            fakes = {key: _fake(tensor) for key, tensor in tensors.items()}
            memo: dict[int, Any] = {id(tensor): fakes[key] for key, tensor in tensors.items()}
            replica = copy.deepcopy(module, memo).train(training)
            value = x.with_grad(True).empty(symbols.given)
            recorder = _Recorder(graph, [("x", value), *fakes.items()])
            with recorder:
                result = replica(value)
    except BlueprintError:
        raise
    except Exception as error:
        raise BlueprintError(f"body {name} cannot be recorded for an input of shape {x.shape}: {error}") from error
    if not isinstance(result, Tensor):
        raise BlueprintError(f"body {name} returned a {type(result).__name__}; expected one tensor like its input")
    graph.output(recorder.node_of(result))
    if _has_own_backward(result):
        raise BlueprintError(
            f"body {name} uses a custom autograd function, whose backward a recorded graph would lose; write it with "
            "PyTorch functions"
        )
    output = TensorMeta.of(result)
    guards = symbols.guards()
    text = canonical(graph) + repr([meta.describe() for meta in (x, *metas)]) + "".join(guards)
    other_input = reads_source(module)
    identity = digest(text + " of the source" * other_input)
    return BodyGraph(graph, tuple(tensors), metas, output, identity, other_input, guards)


def tensor_metas(module: nn.Module) -> tuple[TensorMeta, ...]:
    """What the parameters and then the buffers of a module are."""
    return tuple(TensorMeta.of(tensor) for tensor in _tensors(module).values())


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def body_signature(module: nn.Module) -> tuple[Any, ...] | None:
    """A hashable description that is equal for modules that record to equal graphs, or None where that cannot be told.

    It holds every submodule's type, its plain attributes and the description of every tensor. A module with hooks or with
    attributes that are not plain values has none.
    """
    rows: list[Any] = []
    for path, part in module.named_modules():
        plain = {name: value for name, value in vars(part).items() if name not in _MODULE_ATTRIBUTES}
        plain = {name: value for name, value in plain.items() if not (isinstance(value, dict | set) and not value)}
        if not all(_is_plain(value) for value in plain.values()):
            return None
        rows.append((path, type(part), tuple(sorted((name, repr(value)) for name, value in plain.items()))))
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        rows.append((name, TensorMeta.of(tensor)))
    return tuple(rows)


_MODULE_ATTRIBUTES = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"})


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _has_own_backward(result: Tensor) -> bool:
    """Whether a custom autograd function took part in computing a tensor."""
    seen: set[Any] = set()
    waiting = [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return False


def _fake(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


class _Recorder(TorchFunctionMode):
    """Writes every PyTorch function that returns or changes a tensor into a graph."""

    def __init__(self, graph: fx.Graph, inputs: list[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.graph = graph
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Any] = []  # ids are only unique among living objects
        self.sizes: dict[str, fx.Node] = {}  # what computes them, by their text,
        self.places: dict[int, fx.Node] = {}  # out of the input's dimensions
        self.x = inputs[0][1]
        self.autocast = torch.is_autocast_enabled(), torch.is_autocast_enabled("cpu")
        for name, tensor in inputs:
            self._bind(tensor, graph.placeholder(name.replace(".", "_")))

    def node_of(self, value: Any) -> Any:
        if isinstance(value, torch.Size) and not all(isinstance(size, int) for size in value):
            return tuple(map(self.node_of, value))
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self._number(Size.of(value))
        if isinstance(value, slice):
            return slice(*map(self.node_of, (value.start, value.stop, value.step)))
        if not isinstance(value, Tensor):
            return value
        node = self.nodes.get(id(value))
        if node is None:
            raise BlueprintError(
                f"a tensor of shape {tuple(value.shape)} comes from outside what can be recorded, such as a custom autograd "
                "function or a tensor that is neither parameter nor buffer; write the body with PyTorch functions and "
                "register its tensors as buffers"
            )
        return node

    def _number(self, number: Any) -> Any:
        """What computes a number that is not fixed, out of the sizes of the module's input."""
        if not isinstance(number, Size):
            return number
        if number.text not in self.sizes:
            known = {dim.text: place for place, dim in enumerate(map(Size.of, self.x.shape)) if isinstance(dim, Size)}
            if number.text in known:
                self.sizes[number.text] = self._size(known[number.text])
            else:
                tracer = GraphAppendingTracer(self.graph)
                names = {name: fx.Proxy(self._size(known[name]), tracer) for name, _ in number.names}
                self.sizes[number.text] = evaluate(number.text, names).node
        return self.sizes[number.text]

    def _size(self, place: int) -> fx.Node:
        if place not in self.places:
            self.places[place] = self.graph.call_method("size", (self.nodes[id(self.x)], place))
        return self.places[place]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (torch.is_autocast_enabled(), torch.is_autocast_enabled("cpu")) != self.autocast:
            raise BlueprintError("a body must not change autocast inside its forward")
        leaves = pytree.tree_leaves((args, kwargs))
        if func is SET_GRAD_ENABLED:
            self.graph.call_function(func, args)
            return result
        returns_tensor = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))
        changes_tensor = result is None and any(isinstance(leaf, Tensor) for leaf in leaves)
        if returns_tensor or changes_tensor:
            self._bind(result, self._call(func, pytree.tree_map(self.node_of, (args, kwargs))))
        return result

    def _call(self, func: Any, arguments: tuple[Any, Any]) -> fx.Node:
        args, kwargs = arguments
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a property of a tensor, such as .T
            return self.graph.call_function(getattr, (args[0], func.__self__.__name__))
        if name == "__set__":
            raise BlueprintError(f"a body must not assign to tensor attribute {func.__self__.__name__!r}")
        method = tensor_methods().get(id(func))
        if method is not None and isinstance(args[0], fx.Node):
            return self.graph.call_method(method, tuple(args), kwargs)
        return self.graph.call_function(func, tuple(args), kwargs)

    def _bind(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            self.nodes[id(result)] = node
            self.alive.append(result)
        elif isinstance(result, tuple | list):
            for position, item in enumerate(result):
                if isinstance(item, Tensor | tuple | list):
                    import operator

                    self._bind(item, self.graph.call_function(operator.getitem, (node, position)))
