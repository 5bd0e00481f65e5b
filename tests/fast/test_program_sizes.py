"""Which program a call's sizes get: one for all sizes, or where that cannot be the first few their own, and one the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import esper_fx
from esper_fx.changes import Changes
from esper_fx.engine import program as program_module
from esper_fx.engine.executable import Executable, StaleError
from esper_fx.engine.program import Program
from esper_fx.engine.sized_program import SizedProgram
from esper_fx.passes.carry_sizes import SizesError
from tests.support.programs import SEED

Compile = Callable[[SizedProgram, Any], None]


@pytest.fixture
def model() -> esper_fx.MorphableModel:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    return esper_fx.morph(net, sites=["0"], example_inputs=(torch.zeros(2, 4),))


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_module, "MAX_SIZES", 2)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sizes that are compiled, "any" for all of them, which fails; really they all run eagerly."""
    sizes: list[Any] = []

    def note(self: SizedProgram, args: Any) -> None:
        sizes.append("any" if self.varies else args[0])
        if self.varies:
            raise SizesError("not this one")

    monkeypatch.setattr(SizedProgram, "_compile", note)
    return sizes


@pytest.fixture
def general(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The same, where several sizes can be compiled for: what was compiled for one takes those that are as even or odd."""
    sizes: list[Any] = []

    def note(self: SizedProgram, args: Any) -> None:
        sizes.append("any" if self.varies else args[0])
        if self.varies:
            self.active = Parity.__new__(Parity)
            self.active.remainder, self.active.run = args[0] % 2, self._module

    monkeypatch.setattr(SizedProgram, "_compile", note)
    return sizes


class Parity(Executable):
    remainder: int
    run: Any

    def takes(self, args: Any) -> bool:
        return bool(args[0] % 2 == self.remainder)

    def __call__(self, args: Any) -> Any:
        assert self.takes(args)
        return self.run(*args)


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
    model: esper_fx.MorphableModel, compiled: list[Any], monkeypatch: pytest.MonkeyPatch, *, nested: bool
) -> None:
    kicks: list[Changes] = []

    def note(self: Changes) -> None:
        kicks.append(self)

    monkeypatch.setattr(Changes, "kick", note)
    program = program_of(model, nested=nested)
    for size in (*range(2, 40), *range(2, 40)):
        call(program, size)
    assert compiled == ([] if nested else ["any", 2, 3])
    assert model.stats().programs == len(kicks) == len(program._sized) + 1
    assert len(program._sized) == (0 if nested else 2)


def test_the_sizes_that_were_first_keep_their_own(model: esper_fx.MorphableModel, compiled: list[Any]) -> None:
    program = program_of(model)
    for size in (2, 3, 4):
        call(program, size)
    ran: list[int] = []
    for size, sized in program._sized.items():
        sized.active = lambda args, number=size[0]: ran.append(number) or program.module(*args)
    for size in (4, 3, 5, 2):
        call(program, size)
    assert ran == [3, 2]


def test_sizes_that_no_program_takes_get_one_more(model: esper_fx.MorphableModel, general: list[Any]) -> None:
    program = program_of(model)
    for size in (4, 6, 3, 8, 5, 3, 7, 10, 9):
        call(program, size)
    assert general == ["any", "any"]
    assert model.stats().programs == 2


def test_no_more_than_a_few_programs_are_made(
    model: esper_fx.MorphableModel, general: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_module, "MAX_SIZES", 1)
    program = program_of(model)
    for size in (4, 6, 3, 5, 8):
        call(program, size)
    assert general == ["any"]
    assert model.stats().programs == 2  # for even ones and the rest


def test_an_exception_among_sizes_is_not_what_the_program_for_all_is_made_from(
    model: esper_fx.MorphableModel, general: list[Any]
) -> None:
    program = program_of(model)
    for size in (1, 4, 1, 6):
        call(program, size)
    assert general == [1, "any"]


def test_what_another_thread_has_switched_to_meanwhile_is_not_called_with_sizes_it_does_not_take(
    model: esper_fx.MorphableModel, general: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of(model)
    call(program, 4)
    (sized,) = model.growth.changes.programs
    takes, odd = SizedProgram.takes, sized.active
    sized.active = sized._run_eagerly

    def switching(self: SizedProgram, args: Any, executable: Any = None) -> bool:
        result = takes(self, args, executable)
        self.active = odd
        return result

    monkeypatch.setattr(SizedProgram, "takes", switching)
    call(program, 5)


def test_a_program_is_retired_at_a_boundary(model: esper_fx.MorphableModel, general: list[Any]) -> None:
    program = program_of(model)
    call(program, 4)
    (sized,) = model.growth.changes.programs
    sized._retiring = SizesError("a body")
    assert sized.can_run(set())
    call(program, 4)
    assert not sized.retired
    assert sized.activate(set())
    assert sized.retired
    assert sized.complete
    for size in (4, 6, 4):
        call(program, size)
    assert general == ["any", "any"]
    assert model.stats().programs == 1


def test_bodies_of_another_kind_run_eagerly_for_sizes_that_their_kernels_do_not_take(
    model: esper_fx.MorphableModel, general: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of(model)
    call(program, 5)
    (sized,) = model.growth.changes.programs
    odd, even = sized.active, Parity.__new__(Parity)
    even.remainder, even.run = 0, odd.run

    def stale(self: Parity, args: Any) -> Any:
        if self is odd:
            raise StaleError
        return original(self, args)

    def switch(self: SizedProgram, live: Any) -> bool:
        self.active = even
        return True

    original = Parity.__call__
    monkeypatch.setattr(Parity, "__call__", stale)
    monkeypatch.setattr(SizedProgram, "activate", switch)
    call(program, 5)
    assert sized.active is even


@pytest.mark.parametrize(("failures", "tried"), [(1, ["any", 4, "any"]), (9, ["any", 4, "any", 5, 6])])
def test_what_fails_once_is_tried_again(
    model: esper_fx.MorphableModel, monkeypatch: pytest.MonkeyPatch, failures: int, tried: list[Any]
) -> None:
    made: list[Any] = []

    def note(self: SizedProgram, args: Any) -> None:
        made.append("any" if self.varies else args[0])
        if made.count("any") <= failures and self.varies:
            raise MemoryError

    monkeypatch.setattr(SizedProgram, "_compile", note)
    monkeypatch.setattr(program_module, "MAX_SIZES", 8)
    program = program_of(model)
    for size in (4, 5, 6):
        call(program, size)
    assert made == tried


def test_a_number_that_is_handed_over_as_a_tensor_is_a_constant_of_a_program(
    model: esper_fx.MorphableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[float] = []

    def note(self: SizedProgram, args: Any) -> None:
        made.append(args[0].item())

    monkeypatch.setattr(SizedProgram, "_compile", note)
    program = number_program(model)
    x = torch.linspace(0, 1, 3)
    for number in (0.5, 0.25, 0.5, 0.125, 0.75, 0.25):
        (y,) = program(torch.tensor(number, dtype=torch.float64), x, torch.ones(1), torch.ones(1))
        torch.testing.assert_close(y, x.sin() * number)
    assert made == [0.5, 0.25]  # then all others run eagerly
    assert model.stats().programs == 3


def number_program(model: esper_fx.MorphableModel) -> Program:
    """seed(sin(x)) * n for a number n in a tensor, as Dynamo hands over what may vary."""
    graph = fx.Graph()
    number, x, alpha, gate = (graph.placeholder(name) for name in ("n", "x", "alpha", "gate"))
    for node in (number, x, alpha, gate):
        node.meta["example_value"] = torch.zeros(())
    value = graph.call_method("item", (number,))
    seed = graph.call_function(SEED, (graph.call_function(torch.sin, (x,)), alpha, gate, model.growth.handle, 0, True))
    graph.output((graph.call_function(torch.mul, (seed, value)),))
    return Program(fx.GraphModule(nn.Module(), graph))
