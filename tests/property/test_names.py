"""Nothing that a kernel is addressed by depends on what nodes, modules and parameters are called."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from esper_fx.engine.build import Ambient
from esper_fx.engine.plan import Layout
from esper_fx.engine.region import Template
from esper_fx.passes.canonical import canonical
from esper_fx.passes.metas import TensorMeta
from esper_fx.passes.record import record
from tests.support import programs
from tests.support.examples import property_examples
from tests.support.networks import Description, descriptions
from tests.support.programs import Host, Instruction, instructions

NAMES = st.integers(0, 2**32).map(
    lambda seed: [f"{chr(97 + (seed + n) % 26)}{(seed + 1) * (n + 7) % 9973}" for n in range(40)]
)


@cache
def ambient() -> Ambient:
    return Ambient.current()


def renamed(module: fx.GraphModule, names: list[str]) -> fx.GraphModule:
    """The same graph with other names for nodes, inputs, submodules and attributes."""
    root, graph = nn.Module(), fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    targets: dict[str, str] = {}
    for number, node in enumerate(module.graph.nodes):
        name = f"{names[number % len(names)]}{number}"
        new = mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        new.name = name
        if node.op == "placeholder":
            new.target = name
        elif node.op in ("call_module", "get_attr"):
            target = str(node.target)
            if target not in targets:
                targets[target] = f"{name}_part"
                path, _, attribute = target.rpartition(".")
                setattr(root, targets[target], getattr(module.get_submodule(path), attribute))
            new.target = targets[target]
    return fx.GraphModule(root, graph)


class Body(nn.Module):
    """A body whose layers and buffer have the names that it is given."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = tuple(f"part_{name}" for name in names[:3])
        self.add_module(self.names[0], nn.Linear(4, 3))
        self.register_parameter(self.names[1], nn.Parameter(torch.ones(3)))
        self.add_module(self.names[2], nn.Linear(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, scale, last = (getattr(self, name) for name in self.names)
        result: torch.Tensor = last(torch.tanh(first(x)) * scale)
        return result


def keys(module: fx.GraphModule, args: list[torch.Tensor], body: nn.Module, live: set[int]) -> list[list[str]]:
    """The keys of all kernels of all plans; made anew, not shared with those of an equal graph."""
    layout = Layout(module, args, ambient(), blocks=True)
    bodies = [
        record(body, slot.value, training=True) if number in live else None for number, slot in enumerate(layout.slots)
    ]
    return [
        [
            Template(region.template.graph, region.template.owner, region.template.inputs, ambient())
            .variant([True] * len(region.inputs), [bodies[slot] for slot in region.slots])
            .key.digest
            for region in plan.regions
        ]
        for plan in layout.plans
    ]


@property_examples()
@given(instructions(), NAMES, st.sets(st.integers(0, 3)))
def test_renaming_nodes_inputs_constants_and_parts_of_bodies_keeps_every_kernels_key(
    program: tuple[Instruction, ...], names: list[str], live: set[int]
) -> None:
    host = Host({})
    module = programs.build(program, host.handle)
    other = renamed(module, names)
    assert [node.name for node in other.graph.nodes] != [node.name for node in module.graph.nodes]
    args = programs.arguments(program)
    first = keys(module, args, Body(["one", "two", "three"]), live)
    assert keys(other, args, Body(names), live) == first
    assert all(first)


@property_examples()
@given(descriptions(), NAMES, st.booleans())
def test_renaming_the_modules_of_a_network_keeps_what_it_is_known_by(
    description: Description, names: list[str], training: bool
) -> None:
    net = fx.symbolic_trace(replace(description, outputs=description.outputs[:1]).build())
    x = TensorMeta.of(description.example())
    first = record(net, x, training=training)
    other = record(renamed(net, names), x, training=training)
    assert canonical(other.graph) == canonical(first.graph)
    assert other.tensors == first.tensors
    assert other.identity == first.identity
    assert not set(other.names) & set(first.names)
