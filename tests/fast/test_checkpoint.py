"""Checkpoints of a model: what had grown is restored first, and goes on where it was."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx.blueprints import registry
from esper_fx.errors import GerminationError
from esper_fx.lifecycle import Stage
from tests.support.checkpoints import MANIFEST, checkpoint_of, computed, grown, grown_otherwise
from tests.support.training import Training, assert_same, copied, growth_of, new_model


def safetensors_of(model: nn.Module) -> dict[str, Any]:
    return safetensors.torch.load(safetensors.torch.save(model.state_dict()))


@pytest.mark.parametrize("travel", [checkpoint_of, safetensors_of, lambda model: copy.deepcopy(model.state_dict())])
def test_a_fresh_model_becomes_what_the_checkpoint_was(travel: Callable[[nn.Module], dict[str, Any]]) -> None:
    run = grown()
    model = new_model(seed=1)
    assert str(model.load_state_dict(travel(run.model))) == "<All keys matched successfully>"
    assert_same(growth_of(model), growth_of(run.model))
    assert_same(copied(dict(model.state_dict())), copied(dict(run.model.state_dict())))
    x = torch.randn(4, 4)
    assert torch.equal(computed(model, x), computed(run.model, x))


def test_everything_in_a_state_dict_is_a_tensor() -> None:
    state_dict = grown().model.state_dict()
    assert all(type(value) is Tensor for value in state_dict.values())
    assert (state_dict[MANIFEST].dtype, state_dict[MANIFEST].device.type) == (torch.uint8, "cpu")


def test_growth_goes_on_as_if_it_had_never_stopped() -> None:
    run = grown()
    model = new_model(seed=1)
    model.load_state_dict(checkpoint_of(run.model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    esper_fx.attach(optimizer, model)  # so that the clock counts its steps
    alphas = []
    for each in (run.model, model):
        alphas.append([])
        for clock in range(6, 60):
            each.growth.tick()
            assert each.clock == clock
            alphas[-1].append(each.seeds["a"].alpha)
    assert alphas[0] == alphas[1]
    assert len(set(alphas[0])) == 7  # the rest of the blend, and where it ends
    assert model.seeds["a"].stage == Stage.ACTIVE
    assert model.seeds["c"].stage == Stage.DORMANT  # the embargo has run out
    assert_same(growth_of(model), growth_of(run.model))
    for each in (run.model, model):  # the second germination of this site: other initial values than the first
        each.seeds["c"].germinate("low_rank", rank=2)
    assert_same(copied(dict(model.state_dict())), copied(dict(run.model.state_dict())))


def test_a_model_that_has_grown_otherwise_becomes_what_the_checkpoint_was() -> None:
    run, other = grown(), grown_otherwise()
    gone = [p for s in other.model.seeds.values() if s.body is not None for p in s.body.parameters()]
    other.model.load_state_dict(checkpoint_of(run.model))
    assert_same(growth_of(other.model), growth_of(run.model))
    assert_same(copied(dict(other.model.state_dict())), copied(dict(run.model.state_dict())))
    held = {id(p) for group in other.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in other.model.parameters()}
    assert not any(p in other.optimizer.state for p in gone)
    assert not any(id(p) in held for p in gone)


def test_a_body_that_is_alike_keeps_its_parameters() -> None:
    run = grown()
    saved = checkpoint_of(run.model)
    bodies = {site: run.model.seeds[site].body for site in "ab"}
    state = dict(run.optimizer.state)
    run.live([("train", 1)])
    run.model.load_state_dict(saved)
    assert all(run.model.seeds[site].body is body for site, body in bodies.items())
    assert run.optimizer.state.keys() == state.keys()
    assert_same(copied(dict(run.model.state_dict())), copied(dict(saved)))


def test_a_body_with_another_config_is_replaced() -> None:
    run, other = grown(), Training()
    other.live([("germinate", "a", ("low_rank", {"rank": 3}))])
    was = other.model.seeds["a"].body
    other.model.load_state_dict(checkpoint_of(run.model))
    assert other.model.seeds["a"].body is not was
    assert other.model.seeds["a"].config["rank"] == 2


def test_loading_draws_no_random_numbers() -> None:
    saved, model = checkpoint_of(grown().model), new_model()
    before = torch.get_rng_state()
    model.load_state_dict(saved)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_bodies_are_in_the_mode_of_the_model(training: bool) -> None:
    saved, model = checkpoint_of(grown().model), new_model().train(training)
    model.load_state_dict(saved)
    assert all(module.training is training for module in model.modules())


# What was on its way.


class Stuck:
    """A compiled program that lacks the kernels for any change: what is asked for stays on its way."""

    plan = "whole"

    def __init__(self, model: esper_fx.MorphableModel) -> None:
        self.service = self
        self.growths = [model.growth]
        self.restored: list[set[str]] = []
        self._loop = asyncio.new_event_loop()
        model.growth.changes.programs.add(self)  # type: ignore[arg-type]

    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def run(self, coroutine: Any) -> None:
        coroutine.close()

    def can_run(self, live: set[esper_fx.KasminaSeed]) -> bool:
        return False

    def activate(self, live: set[esper_fx.KasminaSeed]) -> bool:
        return False

    def offer(self, made: object) -> None:
        assert made is None, "nothing was made for it"

    def restore(self, live: set[esper_fx.KasminaSeed]) -> bool:
        self.restored.append({seed.name for seed in live})
        return True


def _under_way() -> tuple[Training, Stuck]:
    """Seeds a and b germinate, b with trained weights and first; c is pruned, but its body still runs."""
    run = Training()
    run.live([("germinate", "c", ("affine", {})), ("train", 1)])
    program = Stuck(run.model)
    weights = {
        name: torch.full_like(p, 0.5)
        for name, p in registry.get("affine").build(run.model.seeds["b"].site, {}, seed=0).state_dict().items()
    }
    run.model.seeds["b"].germinate("affine", weights=weights)
    run.live([("germinate", "a", ("low_rank", {"rank": 2})), ("prune", "c")])
    assert [(seed.stage.name, seed.live) for seed in run.model.seeds.values()] == [
        ("GERMINATING", False),
        ("GERMINATING", False),
        ("EMBARGOED", True),
    ]
    return run, program


def test_a_germination_that_was_under_way_goes_on() -> None:
    run, _program = _under_way()
    fresh = Training(seed=1)
    fresh.model.load_state_dict(checkpoint_of(run.model))
    assert [(s.stage.name, s.live, s.body is not None) for s in fresh.model.seeds.values()] == [
        ("INCUBATING", True, True),
        ("ACTIVE", True, True),  # it came with weights
        ("EMBARGOED", False, False),
    ]
    assert [(e.site, e.to.name) for e in fresh.model.ledger][-2:] == [("b", "ACTIVE"), ("a", "INCUBATING")]
    assert torch.equal(next(fresh.model.seeds["b"].body.parameters()), next(run.model.seeds["b"].body.parameters()))
    held = {id(p) for group in fresh.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in fresh.model.parameters()}
    with esper_fx.configure(embargo_steps=0):
        fresh.live([("train", 40)])
    assert fresh.model.seeds["c"].stage == Stage.DORMANT


def test_every_compiled_program_is_told_which_bodies_there_are() -> None:
    fresh = Training(seed=1)
    program = Stuck(fresh.model)
    waiting = fresh.model.seeds["b"].germinate("affine")
    fresh.model.load_state_dict(checkpoint_of(grown().model))
    assert program.restored == [{"a", "b"}]
    assert fresh.model.growth.changes.swaps == 1
    error = waiting.exception()
    assert isinstance(error, GerminationError)
    assert str(error) == "the body at site 'b' is gone: a checkpoint was loaded before it was live"
    fresh.model.load_state_dict(checkpoint_of(_under_way()[0].model))
    assert program.restored == [{"a", "b"}, set()]
    assert fresh.model.pending
    assert [(s.stage.name, s.live) for s in fresh.model.seeds.values()] == [
        ("GERMINATING", False),
        ("GERMINATING", False),
        ("EMBARGOED", False),
    ]


def test_a_copy_takes_over_what_was_under_way() -> None:
    run, _program = _under_way()
    other = copy.deepcopy(run.model)
    other(torch.zeros(8, 4))
    assert [(s.stage.name, s.live) for s in other.seeds.values()] == [
        ("INCUBATING", True),
        ("ACTIVE", True),
        ("EMBARGOED", False),
    ]


def test_a_frozen_body_that_reads_its_sites_source_comes_back_as_it_was() -> None:
    net, x = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh()), torch.randn(3, 6)
    model = esper_fx.morph(net, sites="0", example_inputs=(x,))
    model.seeds["0"].germinate("low_rank", rank=2, reads="input", scale=2.0)
    body = model.seeds["0"].body
    assert body is not None
    with torch.no_grad():
        for parameter in body.requires_grad_(False).parameters():
            parameter.normal_()
    other = esper_fx.morph(net, sites="0")  # knows nothing of its sites
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert not torch.equal(other(x), net(x))
    restored = other.seeds["0"].body
    assert restored is not None
    assert not any(parameter.requires_grad for parameter in restored.parameters())
    assert other.seeds["0"].site.source is not None
