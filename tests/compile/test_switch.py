"""Which plan runs after a switch whose kernels are all there: always the best one, and nobody is woken for nothing.

Nothing is compiled here: a kernel runs its graph, and is there as soon as it is asked for.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx.cache import KernelKey
from esper_fx.changes import Changes
from esper_fx.engine.executable import Prepared
from esper_fx.engine.region import Variant
from esper_fx.engine.service import Service
from esper_fx.lifecycle import Stage

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> Any:
    def fetch(self: Service, key: KernelKey, payload: Any, priority: int) -> Future[Any]:
        obtain(self, key, payload.func)
        done: Future[Any] = Future()
        done.set_result(None)
        return done

    def obtain(self: Service, key: KernelKey, method_of_variant: Any) -> None:
        self.cache.put(key, Kernel(method_of_variant.__self__), nbytes=1)

    monkeypatch.setattr(Service, "fetch", fetch)
    monkeypatch.setattr(Service, "obtain", obtain)
    monkeypatch.setattr(Service, "start_workers", lambda self: None)
    monkeypatch.setattr("esper_fx.engine.service._services", {})  # such kernels are for nobody else
    with esper_fx.configure(embargo_steps=0):
        yield
    torch.compiler.reset()
    Kernel.made.clear()


class Kernel:
    """Runs a variant's graph."""

    made: ClassVar[list[weakref.ref[Kernel]]] = []

    def __init__(self, variant: Variant) -> None:
        self.key = variant.key
        self.module = variant.module
        self.made.append(weakref.ref(self))

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    @classmethod
    def alive(cls) -> list[Kernel]:
        """Those that somebody holds."""
        gc.collect()
        return [kernel for kernel in (reference() for reference in cls.made) if kernel is not None]


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
    has, other = Prepared.has, program.make(set())

    def interrupted(self: Prepared, bodies: Any) -> bool:
        result = has(self, bodies)
        if model.seeds["1"].live:
            program.offer(other)
        return result

    monkeypatch.setattr(Prepared, "has", interrupted)
    function(X)
    monkeypatch.undo()
    assert model.seeds["1"].live
    assert program.running is not None
    assert [body is not None for body in program.running.bodies] == [True, False]


def test_a_cache_that_is_too_small_bounds_what_stays_in_memory_and_stops_no_growth() -> None:
    """Neither what has run before nor what has only been asked for stays; what runs and what is gathered does."""
    with esper_fx.configure(max_entries=2):
        model = network()
        function = torch.compile(model, backend="esper")
        run(function, model)
        (program,) = model.growth.changes.programs
        for rank in range(1, 8):
            model.seeds["1"].germinate("low_rank", rank=rank)
            run(function, model)
            assert model.seeds["1"].live
            assert plans(model) == ["whole"]
            in_use = {variant.key for pins in (program._pins, program._wanted) for variant in pins.variants}
            assert {kernel.key for kernel in Kernel.alive()} <= in_use
            assert len(Kernel.alive()) == len(program.service.cache) == len(in_use) <= 5
            model.seeds["1"].prune()
            run(function, model)
            assert plans(model) == ["whole"]
    assert program.service.cache.stats().evictions > 7


def test_what_a_program_wanted_is_given_back_with_it() -> None:
    with esper_fx.configure(max_entries=1):
        model = network()
        function = torch.compile(model, backend="esper")
        run(function, model)
        used_to(function, model, "1")
        (program,) = model.growth.changes.programs
        cache = program.service.cache
        assert cache.stats().pinned > 1
        del model, function, program
        torch.compiler.reset()
        gc.collect()
        assert cache.stats().pinned == 0
        assert len(cache) == 1


def test_graphs_that_stand_for_kernels_where_there_are_no_workers_are_no_kernels_where_there_are() -> None:
    with esper_fx.configure(workers=0):
        first = network()
        function = torch.compile(first, backend="esper")
        run(function, first)
        first.seeds["1"].germinate("low_rank", rank=2)
        run(function, first)
        assert first.seeds["1"].live
        assert kernels(first) == [torch.fx.GraphModule]
    second = network()
    function = torch.compile(second, backend="esper")
    run(function, second)
    second.seeds["1"].germinate("low_rank", rank=2)
    run(function, second)
    assert plans(second) == ["whole"]
    assert kernels(second) == [Kernel]


def kernels(model: esper_fx.MorphableModel) -> list[type]:
    """The kinds of the kernels that the model's only program runs."""
    (program,) = model.growth.changes.programs
    found = [kernel for kernel, *_ in program.active._steps]
    return [Kernel if isinstance(kernel, Kernel) else torch.fx.GraphModule for kernel in found]
