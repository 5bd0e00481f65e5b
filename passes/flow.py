"""The flow of data through a model: which operations feed which, how much work each is, and what the modules return."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import flop_registry

from esper_fx._torch import TorchDispatchMode, pytree, storage_id
from esper_fx.passes.pipeline import Draft


@dataclass
class Flow:
    """Operations as nodes, in the order they run, and values as edges.

    Attributes:
        graph: Nodes are numbers; each has ``work``, a number that grows with what the operation costs.
        modules: For each module by qualified name the nodes that made what its calls returned, in order of the calls; only
            modules all of whose calls returned a floating tensor with a feature dimension, or a tuple that begins with one.
        shapes: For each node the shape of its value, where that is known.
        outputs: The nodes that made what the model returns.
    """

    graph: nx.DiGraph = field(default_factory=nx.DiGraph)
    modules: dict[str, list[int]] = field(default_factory=dict)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    outputs: set[int] = field(default_factory=set)

    def add(self, sources: Sequence[int], work: float) -> int:
        """Add an operation that reads the values of ``sources``; returns its number."""
        number = len(self.graph)
        self.graph.add_node(number, work=work)
        self.graph.add_edges_from((source, number) for source in sources)
        return number


def observe(net: nn.Module, call: Callable[[], Any]) -> Flow:
    """The flow of one real call: every operation that PyTorch runs, with its floating-point operations as its work.

    Args:
        net: The model, whose modules get hooks for the time of the call.
        call: Calls it.
    """
    recorder = _Recorder()
    names = {module: name for name, module in net.named_modules() if name}
    handles = [
        module.register_forward_hook(lambda m, _, value: recorder.note_module(names[m], value), always_call=False)
        for module in names
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        with recorder:
            result = call()
    finally:
        for handle in handles:
            handle.remove()
    flow = recorder.flow
    leaves = [leaf for leaf in pytree.tree_leaves(_plain(result)) if isinstance(leaf, Tensor)]
    flow.outputs = {number for leaf in leaves if (number := recorder.number_of(leaf)) is not None}
    for name in recorder.unfit:
        flow.modules.pop(name, None)
    return flow


class _Recorder(TorchDispatchMode):
    """Writes every operation on tensors down as a node."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow = Flow()
        self.unfit: set[str] = set()
        self._made_by: dict[int, int] = {}
        self._changed_by: dict[int, int] = {}
        self._alive: list[Tensor] = []  # ids are only unique among living objects

    def number_of(self, tensor: Tensor) -> int | None:
        """The node that made a tensor's value: the operation that returned it, or the last that wrote into its memory."""
        made, changed = self._made_by.get(id(tensor)), self._changed_by.get(storage_id(tensor))
        known = [number for number in (made, changed) if number is not None]
        return max(known, default=None)

    def note_module(self, name: str, value: Any) -> None:
        """A module has returned."""
        first = value[0] if isinstance(value, tuple | list) and value else value
        number = self.number_of(first) if isinstance(first, Tensor) else None
        if number is None or not first.is_floating_point() or first.ndim < 2:
            self.unfit.add(name)
        else:
            self.flow.modules.setdefault(name, []).append(number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        numbers = {number for tensor in read if (number := self.number_of(tensor)) is not None}
        number = self.flow.add(sorted(numbers), _flops(func, args, kwargs, result))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._made_by[id(tensor)] = number
                self._alive.append(tensor)
                self.flow.shapes.setdefault(number, tuple(tensor.shape))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self._changed_by[storage_id(value)] = number
                self._alive.append(value)
        return result


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    count = flop_registry.get(func.overloadpacket)
    if count is not None:
        try:
            return float(count(*args, **kwargs, out_val=result))
        except Exception:  # a form of the operation that the counter does not know
            return 1.0
    if "rnn" in func.name() or "lstm" in func.name() or "gru" in func.name():
        values = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        positions = math.prod(values[0].shape[:-1]) if values else 1
        return 2.0 * positions * sum(leaf.numel() for leaf in values[1:] if leaf.ndim == 2)
    return 0.0


def _plain(value: Any) -> Any:
    """Dataclasses and other objects with tensors in their attributes as dicts; mappings of any class too."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return dict(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, Tensor) else value


def of_graph(draft: Draft) -> Flow:
    """The flow of a traced draft, without running it: an operation's work is the number of weights it reads."""
    assert draft.graph is not None
    flow = Flow()
    numbers: dict[fx.Node, int] = {}
    for node in draft.graph.nodes:
        if node.op in ("call_function", "call_method", "call_module"):
            sources = [numbers[n] for n in node.all_input_nodes if n in numbers]
            numbers[node] = flow.add(sources, _weights(draft.root, node))
        elif node.op == "output":
            flow.outputs = {numbers[n] for n in node.all_input_nodes if n in numbers}
    for name, visits in draft.outputs.items():
        nodes = [value[0] if isinstance(value, tuple | list) and value else value for value in visits]
        if name and all(isinstance(node, fx.Node) and node in numbers for node in nodes):
            flow.modules[name] = [numbers[node] for node in nodes]
    return flow


def _weights(root: nn.Module, node: fx.Node) -> float:
    tensors: list[Any] = []
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        tensors = [] if isinstance(module, nn.Embedding | nn.EmbeddingBag) else list(module.parameters())
    elif node.op == "call_function" and node.target is not nn.functional.embedding:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                path, _, name = str(source.target).rpartition(".")
                tensors.append(getattr(root.get_submodule(path), name, None))
    return float(sum(t.numel() for t in tensors if isinstance(t, Tensor) and t.ndim >= 2))
