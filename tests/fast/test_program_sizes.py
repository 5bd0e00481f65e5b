"""A program that is called with ever new sizes: the first few are compiled, one executable runs all others eagerly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import esper_fx
from esper_fx.changes import Changes
from esper_fx.engine import program as program_module
from esper_fx.engine.program import Program
from esper_fx.engine.sized_program import SizedProgram
from tests.support.programs import SEED


@pytest.fixture
def model() -> esper_fx.MorphableModel:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    return esper_fx.morph(net, sites=["0"], example_inputs=(torch.zeros(2, 4),))


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that are compiled, two at most; really they all run eagerly."""
    sizes: list[int] = []

    def note(self: SizedProgram, args: Any) -> None:
        sizes.append(args[0])

    monkeypatch.setattr(SizedProgram, "_compile", note)
    monkeypatch.setattr(program_module, "MAX_SIZES", 2)
    return sizes


def program_of(model: esper_fx.MorphableModel, *, nested: bool = False) -> Program:
    """seed(sin(x)) + n for a number n and a tensor x, as Dynamo hands over a graph with a symbolic size."""
    graph = fx.Graph()
    number, x, alpha, gate = (graph.placeholder(name) for name in ("n", "x", "alpha", "gate"))
    for node in (x, alpha, gate):
        node.meta["example_value"] = torch.zeros(())
    seed = graph.call_function(SEED, (graph.call_function(torch.sin, (x,)), alpha, gate, model.growth.handle, 0, True))
    graph.output((graph.call_function(torch.add, (seed, number)),))
    module = fx.GraphModule(nn.Module(), graph)
    if nested:
        module.inner = fx.GraphModule(nn.Module(), graph)
    return Program(module)


def call(program: Program, size: int) -> Tensor:
    x = torch.linspace(0, 1, size)
    (y,) = program(size, x, torch.ones(1), torch.ones(1))
    torch.testing.assert_close(y, x.sin() + size)
    return y


@pytest.mark.parametrize("nested", [False, True], ids=["many sizes", "seeds in a nested graph"])
def test_there_is_one_more_program_for_all_further_sizes(
    model: esper_fx.MorphableModel, compiled: list[int], monkeypatch: pytest.MonkeyPatch, *, nested: bool
) -> None:
    kicks: list[Changes] = []

    def note(self: Changes) -> None:
        kicks.append(self)

    monkeypatch.setattr(Changes, "kick", note)
    program = program_of(model, nested=nested)
    for size in (*range(1, 40), *range(1, 40)):
        call(program, size)
    assert compiled == ([] if nested else [1, 2])
    assert model.stats().programs == len(kicks) == len(compiled) + 1
    assert len(program._sized) == len(compiled)


def test_the_sizes_that_were_first_keep_their_own(model: esper_fx.MorphableModel) -> None:
    program = program_of(model)
    for size in (1, 2, 3):
        call(program, size)
    ran: list[int] = []
    for size, sized in program._sized.items():
        sized.active = lambda args, number=size[0]: ran.append(number) or program.module(*args)
    for size in (3, 2, 4, 1):
        call(program, size)
    assert ran == [2, 1]
