"""Which plan runs after a switch whose kernels are all there: always the best one, and nobody is woken for nothing.

Graphs stand in for kernels here, so that every kernel is there as soon as it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx.changes import Changes
from esper_fx.engine.program import Running
from esper_fx.engine.region import Variant
from esper_fx.engine.service import Service
from esper_fx.lifecycle import Stage

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _graphs_for_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    def request(self: Variant, service: Service, *, priority: int, retry: bool) -> None:
        self.kernel = self.module

    monkeypatch.setattr(Variant, "request", request)
    monkeypatch.setattr(Service, "obtain", lambda self, key, compile_here: compile_here.__self__.module)
    with esper_fx.configure(embargo_steps=0):
        yield
    torch.compiler.reset()


def network() -> esper_fx.MorphableModel:
    net = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)])
    return esper_fx.morph(net, sites=["1", "2"], example_inputs=(X,))


def run(function: Callable[[Tensor], Tensor], *models: esper_fx.MorphableModel, steps: int = 3) -> None:
    """Some steps, each after all that goes on beside them has settled."""
    for _ in range(steps):
        function(X).sum().backward()
        assert all(model.settle(10) for model in models)


def plans(model: esper_fx.MorphableModel) -> list[str]:
    return [program.plan for program in model.growth.changes.programs]


def used_to(function: Callable[[Tensor], Tensor], model: esper_fx.MorphableModel, *sites: str) -> None:
    """The kernels for bodies at these sites, together, have been made, and the bodies are gone again."""
    orders = [esper_fx.growth.Order(model.seeds[site], "low_rank", {"rank": 2}) for site in sites]
    model.growth.germinate_together(orders)
    run(function, model)
    assert all(model.seeds[site].live for site in sites)
    model.growth.prune_together([model.seeds[site] for site in sites], "to be grown again")
    run(function, model)
    assert all(model.seeds[site].stage is Stage.DORMANT for site in sites)


def test_a_germination_that_is_withdrawn_leaves_the_other_with_its_best_plan() -> None:
    model = network()
    function = torch.compile(model, backend="esper")
    run(function, model)
    used_to(function, model, "1", "2")
    model.seeds["2"].germinate("low_rank", rank=2)
    model.seeds["1"].germinate("low_rank", rank=2)
    model.seeds["2"].prune()
    run(function, model)
    assert model.seeds["1"].live
    assert plans(model) == ["whole"]


def test_two_models_of_one_program_that_grow_in_one_step_get_its_best_plan() -> None:
    one, two = network(), network()
    function = torch.compile(lambda x: two(one(x)), backend="esper")
    run(function, one, two)
    for model in (one, two):
        used_to(function, model, "1")
    for model in (one, two):
        model.seeds["1"].germinate("low_rank", rank=2)
    run(function, one, two)
    assert one.seeds["1"].live
    assert two.seeds["1"].live
    assert plans(one) == plans(two) == ["whole"]


def test_a_program_that_comes_before_the_switch_gets_its_best_plan() -> None:
    model = network()
    function = torch.compile(model, backend="esper")
    run(function, model)
    used_to(function, model, "1")
    model.seeds["1"].germinate("low_rank", rank=2)
    model.eval()
    with torch.no_grad():
        function(X)
    model.train()
    run(function, model, steps=5)
    assert model.seeds["1"].live
    assert plans(model) == ["whole", "whole"]


def test_where_nothing_is_left_to_get_ready_nobody_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    function = torch.compile(model, backend="esper")
    run(function, model)
    used_to(function, model, "1")
    model.seeds["1"].germinate("low_rank", rank=2)
    assert model.settle(10)
    model.seeds["1"].prune()
    run(function, model)
    model.seeds["1"].germinate("low_rank", rank=2)
    woken: list[object] = []
    monkeypatch.setattr(Changes, "kick", woken.append)
    function(X)
    assert model.seeds["1"].live
    assert woken == []


def test_what_was_made_for_other_bodies_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another thread makes something else ready in the middle of a boundary."""
    model = network()
    function = torch.compile(model, backend="esper")
    run(function, model)
    used_to(function, model, "1")
    model.seeds["1"].germinate("low_rank", rank=2)
    (program,) = model.growth.changes.programs
    has, other = Running.has, program.make(set())

    def interrupted(self: Running, bodies: Any) -> bool:
        result = has(self, bodies)
        if model.seeds["1"].live:
            program.offer(other)
        return result

    monkeypatch.setattr(Running, "has", interrupted)
    function(X)
    monkeypatch.undo()
    assert model.seeds["1"].live
    assert program._running is not None
    assert [body is not None for body in program._running.bodies] == [True, False]
