"""Random programs: graphs as Dynamo hands them to the engine, with seeds, views, changes in place and mode switches."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from esper_fx import ops
from esper_fx.passes.metas import Symbols

SHAPE = (2, 4)
SEED = torch.ops.esper.seed
UNARY = (torch.sin, torch.relu, torch.sigmoid, torch.neg)
Body = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Instruction:
    """One or a few operations; ``a`` and ``b`` choose earlier values, counted from the newest."""

    kind: str
    a: int
    b: int


@st.composite
def instructions(draw: st.DrawFn, *, modes: bool = True) -> tuple[Instruction, ...]:
    """A program with at least one seed. ``modes``: with blocks under no_grad and autocast."""
    kinds = ["unary", "binary", "seed", "source", "linear", "chunk", "in place", "view", "repeat"] + [
        "no_grad",
        "autocast",
    ] * modes
    near = st.integers(0, 3)
    steps = draw(st.lists(st.builds(Instruction, st.sampled_from(kinds), near, near), min_size=2, max_size=14))
    steps.insert(draw(st.integers(0, len(steps))), Instruction("seed", 0, 0))
    return tuple(steps)


def build(program: Sequence[Instruction], handle: int = 0) -> fx.GraphModule:
    """The graph; its inputs are x, y and weight, all float32 [2, 4] but weight [4, 4], then alpha and gate [n_seeds]."""
    graph, root = fx.Graph(), nn.Module()
    root.register_buffer("constant", torch.linspace(-1, 1, 4))
    x, y, weight, alpha, gate = (graph.placeholder(name) for name in ("x", "y", "weight", "alpha", "gate"))
    constant = graph.get_attr("constant")
    values = [graph.call_function(torch.add, (x, y))]
    seeds = 0

    def add(function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call_function(function, args, kwargs)

    for step in program:
        a, b = (values[-1 - index % len(values)] for index in (step.a, step.b))
        if step.kind == "unary":
            values.append(add(UNARY[step.b], a))
        elif step.kind == "binary":
            values.append(add(torch.mul if step.a % 2 else torch.add, a, b))
        elif step.kind == "seed":
            values.append(add(SEED, a, alpha, gate, handle, seeds, True))
            seeds += 1
        elif step.kind == "source":
            product = add(torch.add, add(torch.matmul, a, weight), constant)
            values.append(add(SEED, product, alpha, gate, handle, seeds, True, a))
            seeds += 1
        elif step.kind == "linear":
            values.append(add(torch.add, add(torch.matmul, a, weight), constant))
        elif step.kind == "chunk":
            halves = add(torch.chunk, a, 2, dim=-1)
            values.append(add(torch.cat, [add(_item, halves, 1), add(_item, halves, 0)], dim=-1))
        elif step.kind == "in place":
            fresh = graph.call_method("clone", (a,))
            values += [fresh, add(torch.mul, fresh, 0.5), graph.call_method("add_", (fresh, b))]
        elif step.kind == "view":
            values.append(graph.call_method("view", (graph.call_method("view", (a, -1)), *SHAPE)))
        elif step.kind == "repeat":
            for _ in range(4):
                values.append(add(torch.add, values[-1], add(torch.tanh, add(torch.matmul, values[-1], weight))))
        elif step.kind == "no_grad":
            add(torch._C._set_grad_enabled, False)
            scale = add(torch.sin, a)
            add(torch._C._set_grad_enabled, True)
            values.append(add(torch.mul, scale, b))
        elif step.kind == "autocast":
            mode = add(_enter_autocast, "cpu", torch.bfloat16, True, None)
            product = add(torch.matmul, a, weight)
            add(_exit_autocast, mode)
            values.append(graph.call_method("float", (product,)))
    graph.output((values[-1], values[-1 - program[0].b % len(values)], constant, 7))
    return fx.GraphModule(root, graph)


def with_rows(module: fx.GraphModule, rows: int) -> fx.GraphModule:
    """A program whose x and y have any number of rows, as Dynamo hands it over when they had ``rows``: a last input tells it.

    Views take it from there, and what is added or multiplied is first scaled by another way to have the number 1. It returns
    twice the number and the number besides.
    """
    symbols = Symbols({"rows": rows})
    shapes: dict[str, tuple[Any, ...]] = {
        "x": (symbols.given["rows"], 4),
        "y": (symbols.given["rows"], 4),
        "weight": (4, 4),
    }
    seeds = max(1, sum(node.target is SEED for node in module.graph.nodes))
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    number: fx.Node | None = None
    with symbols.mode:
        for node in module.graph.nodes:
            if node.op != "placeholder" and number is None:
                number = graph.placeholder("rows")
                number.meta["example_value"] = symbols.given["rows"]
            new = mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            if node.op == "placeholder":
                new.meta["example_value"] = torch.empty(shapes.get(node.name, (seeds,)))
            elif node.target == "view" and len(node.args) == 3:
                new.args = (new.args[0], number, 4)
            elif node.op == "call_function" and node.target in (torch.add, torch.mul):
                size = graph.call_method("size", (new, 0))
                one = graph.call_function(operator.sub, (graph.call_function(operator.add, (number, 1)), size))
                mapping[node] = graph.call_function(torch.mul, (new, one))
            elif node.op == "output":
                results = list(new.args[0])
                with graph.inserting_before(new):
                    size = graph.call_method("size", (results[0], 0))
                    new.args = ((*results, graph.call_function(operator.mul, (size, 2)), number),)
    return fx.GraphModule(module, graph)


def _item(values: Sequence[Tensor], index: int) -> Tensor:
    return values[index]


def count_seeds(program: Sequence[Instruction]) -> int:
    """How many seeds a program has; those of kind "source" follow a linear map and are given its input."""
    return sum(step.kind in ("seed", "source") for step in program)


def arguments(
    program: Sequence[Instruction], *, grad: tuple[bool, bool, bool] = (True, False, True), rows: int = SHAPE[0]
) -> list[Any]:
    """Random arguments for a program; alpha and gate differ from seed to seed."""
    generator = torch.Generator().manual_seed(3)
    seeds = count_seeds(program)
    shapes = ((rows, 4), (rows, 4), (4, 4))
    tensors = [torch.randn(s, generator=generator).requires_grad_(g) for s, g in zip(shapes, grad, strict=True)]
    return [*tensors, torch.linspace(0.5, 1.0, seeds), torch.linspace(0.25, 1.0, seeds)]


class Host:
    """Stands for the model that seeds belong to: the bodies by site; the others sleep. Keep it alive while it is used."""

    def __init__(self, bodies: Mapping[int, Body]) -> None:
        self.bodies = bodies
        self.handle = -1 - id(self)
        ops.hosts[self.handle] = self

    def run_seed(self, site: int, x: Tensor, alpha: Tensor, gate: Tensor, source: Tensor | None = None) -> Tensor:
        """What the seed's operator does outside of a kernel."""
        body = self.bodies.get(site)
        return x if body is None else ops.seed_forward(x, body, alpha[site], gate[site], source)
