"""Replace what a live seed computes by one fused operator, where that has kernels and the caller chooses it.

A region's graph spells a live seed out as PyTorch functions between ``seed_input`` and ``seed_output``. Where these functions
are what a fused operator computes, that is a candidate. The pass finds candidates and rewrites those that are chosen; the
choice, by measurement, is the caller's. What is not chosen is left to Inductor.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from esper_fx.ops import seed_input, seed_output

MAX_RANK = 64

_CONVOLUTIONS: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_ACTIVATIONS: dict[Any, str] = {
    torch.relu: "relu",
    functional.relu: "relu",
    functional.gelu: "gelu",
    functional.silu: "silu",
}


@dataclass(frozen=True, eq=False)
class Candidate:
    """A live seed in a graph that a fused operator could compute.

    Attributes:
        operator: Name of the operator, such as ``low_rank``.
        output: The node that the operator would replace.
        x: The value at the site.
        alpha: Its factor, 0-dim.
        gate: The factor on gradients through the body, 0-dim.
        weights: Tensors of the body, in the operator's order; for ``low_rank`` the layers' weights as they are.
        scale: A 0-dim factor on what the body returns, or None.
        options: Arguments of the operator that are not tensors, without ``config``.
        dtype: What products are taken in.
    """

    operator: str
    output: fx.Node
    x: fx.Node
    alpha: fx.Node
    gate: fx.Node
    weights: tuple[fx.Node, ...]
    scale: fx.Node | None
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def describe(self) -> list[Any]:
        """A JSON value that is equal for candidates which the same code serves equally well; for keys."""
        values = [_example(node) for node in (self.x, *self.weights)]
        tensors = [[list(t.shape), list(t.stride()), str(t.dtype), str(t.device), t.requires_grad] for t in values]
        return [self.operator, str(self.dtype), [list(item) for item in sorted(self.options.items())], tensors]


#: Says which configuration of the operator to take, or None to leave the candidate to Inductor.
Choose = Callable[[Candidate], int | None]


def lower(graph: fx.Graph, *, choose: Choose, autocast: torch.dtype | None = None) -> bool:
    """Rewrite the candidates that ``choose`` takes; returns whether there was one.

    Args:
        graph: A region's variant with ``meta["example_value"]`` at every node; new nodes have none.
        choose: Is asked once for each candidate.
        autocast: What products are cast to where the values are; None without autocast.
    """
    changed = False
    for candidate in candidates(graph, autocast=autocast):
        config = choose(candidate)
        if config is not None:
            rewrite(graph, candidate, config)
            changed = True
    if changed:
        graph.lint()
    return changed


def candidates(graph: fx.Graph, *, autocast: torch.dtype | None = None) -> list[Candidate]:
    """The live seeds in a graph that a fused operator could compute, in order; arguments as for :func:`lower`."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target is seed_output:
            for match in (_low_rank, _depthwise_conv, _channel_gate):
                candidate = match(node, autocast)
                if candidate is not None:
                    found.append(candidate)
                    break
    return found


def rewrite(graph: fx.Graph, candidate: Candidate, config: int) -> None:
    """Let the fused operator compute a candidate, with this configuration, instead of the nodes that do so now."""
    importlib.import_module(f"esper_fx.ops.{candidate.operator}")  # defines the operator
    target = getattr(torch.ops.esper, candidate.operator).default
    node, last = candidate.output, candidate.output.prev
    with graph.inserting_before(node):
        weights = [_weight(graph, weight, candidate) for weight in candidate.weights]
        alpha = candidate.alpha
        if candidate.scale is not None:  # a factor on what the body returns is one on alpha
            alpha = graph.call_function(torch.mul, (alpha, candidate.scale))
        options = {**candidate.options, "config": config}
        if "save" in {argument.name for argument in target._schema.arguments}:
            options["save"] = _example(node).requires_grad
        result = graph.call_function(target, (candidate.x, *weights, alpha, candidate.gate), options)
        if len(target._schema.returns) > 1:
            result = graph.call_function(operator.getitem, (result, 0))
    made = last.next
    while made is not node:
        made.meta.update({key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta})
        made = made.next
    node.replace_all_uses_with(result)
    _erase(graph, node)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node, and those before it that only it needed. Others without users stay: they may change a buffer."""
    if not node.users and node.op != "placeholder":
        operands = node.all_input_nodes
        graph.erase_node(node)
        for operand in operands:
            _erase(graph, operand)


def _weight(graph: fx.Graph, weight: fx.Node, candidate: Candidate) -> fx.Node:
    """A weight as the operator takes it."""
    value = _example(weight)
    if candidate.operator == "low_rank":  # the weight of a linear map is [out, in], and of a convolution [out, in, 1…]
        flat = graph.call_method("flatten", (weight, 1)) if value.ndim > 2 else weight
        weight = graph.call_method("t", (flat,))
    return weight if value.dtype == candidate.dtype else graph.call_method("to", (weight, candidate.dtype))


# What each operator computes, as it is written in a graph.


def _low_rank(node: fx.Node, autocast: torch.dtype | None) -> Candidate | None:
    """up(activation(down(x))) without biases, times a scalar at most."""
    x, delta, _ = _operands(node)
    scale = None
    if _is_method(delta, "mul") and isinstance(delta.args[1], fx.Node) and _example(delta.args[1]).ndim == 0:
        delta, scale = delta.args[0], delta.args[1]
    up = _pointwise(delta)
    middle = up and up[0]
    activation = "identity"
    if middle and middle.target in _ACTIVATIONS and middle.kwargs.get("approximate", "none") == "none":
        activation, middle = _ACTIVATIONS[middle.target], _only_operand(middle)
    down = _pointwise(middle)
    if up is None or down is None or up[2] != down[2] or not _all_private(delta, down[0]):
        return None
    rank, dim = _example(down[1]).shape[0], down[2] % _example(x).ndim
    if rank > MAX_RANK:
        return None
    options = {"activation": activation, "dim": dim}
    return _candidate("low_rank", node, down[0], (down[1], up[1]), scale, options, autocast)


def _depthwise_conv(node: fx.Node, autocast: torch.dtype | None) -> Candidate | None:
    """One convolution with a filter and a bias for every channel, in one or two dimensions."""
    _, delta, _ = _operands(node)
    dims = _CONVOLUTIONS.get(delta.target, 0) if isinstance(delta, fx.Node) and not delta.kwargs else 0
    if dims not in (1, 2) or len(delta.args) != 7:
        return None
    inner, weight, bias, stride, padding, dilation, groups = delta.args
    shape = _example(weight).shape
    plain = (stride, padding, dilation) == ((1,) * dims, "same", (1,) * dims)
    if not plain or bias is None or shape[:2] != (groups, 1) or any(size % 2 == 0 for size in shape[2:]):
        return None
    if _example(node).ndim != dims + 2 or len(delta.users) > 1:
        return None
    return _candidate("depthwise_conv", node, inner, (weight, bias), None, {}, autocast, same_dtype=True)


def _channel_gate(node: fx.Node, autocast: torch.dtype | None) -> Candidate | None:
    """x * tanh(up(relu(down(mean of x over positions))) / 2)."""
    _, delta, _ = _operands(node)
    if not _is_method(delta, "mul"):
        return None
    inner, step = delta.args
    nodes: list[Any] = []
    wanted = ["unsqueeze"] * (_example(node).ndim - 2) + ["tanh", "mul", "linear", "relu", "linear", "mean", "flatten"]
    for name in wanted:
        if not isinstance(step, fx.Node) or _name(step) != name:
            return None
        nodes.append(step)
        step = step.args[0]
    tanh, half, up, _, down, mean, flat = nodes[-7:]
    fixed = half.args[1] == 0.5 and mean.args[1:] == (2,) and flat.args[1:] == (2,)
    if not fixed or any(n.args[1:] != (-1,) for n in nodes[:-7]) or tanh.kwargs:
        return None
    weights = (*down.args[1:], *up.args[1:])
    if inner is flat:  # to flatten what is flat is the identity, whose result the graph goes on with
        inner = step
    if step is not inner or len(weights) != 4 or None in weights:
        return None
    return _candidate("channel_gate", node, inner, weights, None, {}, autocast, same_dtype=True)


def _candidate(
    name: str,
    node: fx.Node,
    inner: Any,
    weights: tuple[Any, ...],
    scale: Any,
    options: Mapping[str, Any],
    autocast: torch.dtype | None,
    *,
    same_dtype: bool = False,
) -> Candidate | None:
    """The candidate, if its body reads the value at the site, and its dtypes are ones that the operator takes."""
    x, _, alpha = _operands(node)
    if not (isinstance(inner, fx.Node) and inner.target is seed_input and inner.args[:2] == (x, alpha)):
        return None
    value, dtype = _example(x), autocast or _example(weights[0]).dtype
    if _example(node).dtype != value.dtype or (autocast is None and value.dtype != dtype):
        return None
    if same_dtype and value.dtype != dtype:
        return None
    return Candidate(name, node, x, alpha, inner.args[2], weights, scale, options, dtype)  # type: ignore[arg-type]


def _pointwise(node: Any) -> tuple[Any, Any, int] | None:
    """Input, weight and feature dimension of a linear map without bias, the same at every position."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.kwargs:
        return None
    if node.target is functional.linear and node.args[2:] in ((), (None,)):
        return node.args[0], node.args[1], -1
    dims = _CONVOLUTIONS.get(node.target, 0)
    if dims and len(node.args) == 7 and _example(node).ndim == dims + 2:
        inner, weight, *rest = node.args
        plain = rest == [None, (1,) * dims, (0,) * dims, (1,) * dims, 1]
        if plain and set(_example(weight).shape[2:]) == {1}:
            return inner, weight, 1
    return None


def _all_private(node: Any, stop: Any) -> bool:
    """Whether nobody but the next reads what lies between ``node`` and ``stop``, both included."""
    while True:
        if len(node.users) > 1:
            return False
        if node is stop:
            return True
        node = node.args[0]


def _only_operand(node: fx.Node) -> Any:
    return node.args[0] if len(node.all_input_nodes) == 1 else None


def _operands(node: fx.Node) -> tuple[Any, Any, Any]:
    x, delta, alpha = node.args
    return x, delta, alpha


def _is_method(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target == name and len(node.args) == 2


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _example(node: Any) -> Tensor:
    value: Tensor = node.meta["example_value"]
    return value
