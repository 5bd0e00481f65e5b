"""Optimizers go by names: their state finds its parameters in whatever order those joined, or nothing is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import esper_fx
from esper_fx.errors import OptimizerError
from tests.support.training import OPTIMIZERS, Net, Training, assert_same, carried, copied, new_model

LIFE = [
    ("train", 1),
    ("germinate", "c", ("affine", {})),
    ("train", 1),
    ("germinate", "a", ("low_rank", {"rank": 2})),
    ("train", 1),
    ("germinate", "b", ("affine", {})),
    ("train", 1),
]


def state_by_name(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: copied(state) for parameter, state in optimizer.state.items()}


def names_of(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def restored_model(run: Training) -> esper_fx.MorphableModel:
    model = new_model(seed=1)
    model.load_state_dict(carried(run.model.state_dict()))
    return model


def refused(optimizer: Optimizer, model: nn.Module, state_dict: dict[str, Any], wording: str) -> None:
    before, order = copied(optimizer.state_dict()), names_of(optimizer, model)
    with pytest.raises(OptimizerError, match=wording) as caught:
        optimizer.load_state_dict(state_dict)
    assert isinstance(caught.value, ValueError)
    assert_same(copied(optimizer.state_dict()), before)
    assert names_of(optimizer, model) == order


@pytest.mark.parametrize("own_group", [False, True])
@pytest.mark.parametrize("attach_first", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_order_and_state_come_back_whichever_is_loaded_first(
    name: str, attach_first: bool, own_group: bool
) -> None:
    run = Training(name, own_group=own_group)
    run.live(LIFE)
    saved = carried(run.save())
    other = Training(name, own_group=own_group, checkpoint=saved, attach_first=attach_first, seed=1)
    assert names_of(other.optimizer, other.model) == names_of(run.optimizer, run.model)
    assert_same(state_by_name(other.optimizer, other.model), state_by_name(run.optimizer, run.model))
    assert_same(other.facts(), {**run.facts(), "random": saved["random"]})


def test_the_saved_groups_hold_names_and_shapes_in_plain_types() -> None:
    run = Training()
    run.live([("germinate", "c", ("affine", {})), ("train", 1)])
    (group,) = run.optimizer.state_dict()["param_groups"]
    assert group["esper_names"][-2:] == ["esper.seeds.c.body.scale", "esper.seeds.c.body.shift"]
    assert group["esper_shapes"][:2] == [[6, 4], [6]]
    assert len(group["esper_names"]) == len(group["esper_shapes"]) == len(group["params"])
    assert "esper_names" not in run.optimizer.param_groups[0]


def test_after_loading_parameters_still_join_and_leave_the_seeds_own_group() -> None:
    run = Training(own_group=True)
    run.live([("germinate", "c", ("affine", {})), ("train", 1)])
    run.load(carried(run.save()))
    run.live([("germinate", "a", ("affine", {})), ("prune", "c")])
    body = run.model.seeds["a"].body
    assert body is not None
    assert [id(p) for p in run.optimizer.param_groups[1]["params"]] == [id(p) for p in body.parameters()]


@pytest.mark.parametrize("name", ["adam", "adam with names"])
def test_a_state_without_names_loads_by_position_as_ever(name: str) -> None:
    first, second = new_model(), new_model()
    plain = OPTIMIZERS[name](first)
    first(torch.randn(8, 4)).sum().backward()
    plain.step()
    optimizer = OPTIMIZERS[name](second)
    esper_fx.attach(optimizer, second)
    optimizer.load_state_dict(carried(plain.state_dict()))
    assert_same(state_by_name(optimizer, second), state_by_name(plain, first))


def test_an_optimizer_that_was_loaded_before_it_was_attached_is_put_right() -> None:
    run = Training()
    run.live(LIFE)
    model = restored_model(run)
    optimizer = Adam(model.parameters(), lr=0.01)
    optimizer.load_state_dict(carried(run.optimizer.state_dict()))
    assert names_of(optimizer, model) != names_of(run.optimizer, run.model)
    esper_fx.attach(optimizer, model)
    assert names_of(optimizer, model) == names_of(run.optimizer, run.model)
    assert_same(state_by_name(optimizer, model), state_by_name(run.optimizer, run.model))
    assert_same(copied(optimizer.state_dict()), copied(run.optimizer.state_dict()))


def test_an_optimizer_that_was_loaded_with_other_parameters_is_not_attached() -> None:
    run = Training()
    run.live([("germinate", "a", ("affine", {})), ("train", 1)])
    other = Training()
    other.live([("germinate", "b", ("affine", {})), ("train", 1)])
    model = restored_model(run)
    optimizer = Adam(model.parameters(), lr=0.01)
    optimizer.load_state_dict(other.optimizer.state_dict())
    with pytest.raises(OptimizerError, match=r"it lacks esper.seeds.a.body.scale, esper.seeds.a.body.shift"):
        esper_fx.attach(optimizer, model)
    assert model.growth.attachment is None
    optimizer.step()
    assert model.clock == run.model.clock  # no hook was left behind


def test_parameters_that_do_not_match_are_named() -> None:
    run = Training()
    run.live(LIFE)
    saved = carried(run.optimizer.state_dict())
    fresh = Training(seed=1)
    refused(
        fresh.optimizer,
        fresh.model,
        saved,
        "of other parameters, and nothing of it was loaded: it has esper.seeds.c.body.scale, esper.seeds.c.body.shift, "
        "esper.seeds.a.body.down.weight, esper.seeds.a.body.up.weight, esper.seeds.b.body.scale, esper.seeds.b.body.shift, "
        r"which this Adam does not hold. Load the model first.* and attach\(\) the optimizer",
    )
    refused(run.optimizer, run.model, fresh.optimizer.state_dict(), "it lacks esper.seeds.c.body.scale")


def test_shapes_that_do_not_match_are_named() -> None:
    wide, narrow = Training(), Training()
    wide.live([("germinate", "a", ("low_rank", {"rank": 3})), ("train", 1)])
    narrow.live([("germinate", "a", ("low_rank", {"rank": 2})), ("train", 1)])
    refused(
        narrow.optimizer,
        narrow.model,
        carried(wide.optimizer.state_dict()),
        r"esper.seeds.a.body.down.weight has shape \[3, 6\] in it, \[2, 6\] here",
    )


def test_another_number_of_groups_is_refused() -> None:
    saved = carried(Training(own_group=True).optimizer.state_dict())
    run = Training()
    refused(run.optimizer, run.model, saved, "it has 2 parameter groups, this Adam has 1")


def test_a_state_that_names_only_some_parameters_is_refused() -> None:
    run = Training("adamw with groups")
    saved = carried(run.optimizer.state_dict())
    del saved["param_groups"][1]["esper_names"]
    refused(run.optimizer, run.model, saved, "it does not name all its parameters")


def test_names_that_the_optimizer_keeps_itself_follow_joining_leaving_and_loading() -> None:
    run = Training("adam with names", own_group=True)
    run.live([*LIFE, ("prune", "a"), ("train", 1)])
    assert [group["param_names"] for group in run.optimizer.param_groups] == names_of(run.optimizer, run.model)
    other = Training("adam with names", own_group=True, checkpoint=carried(run.save()), attach_first=False)
    assert [group["param_names"] for group in other.optimizer.param_groups] == names_of(other.optimizer, other.model)


def test_parameters_outside_the_model_keep_their_place() -> None:
    def make(seed: int) -> tuple[esper_fx.MorphableModel, nn.Module, Optimizer]:
        model, head = new_model(seed), nn.Linear(3, 3)
        optimizer = SGD([*head.parameters(), *model.parameters()], lr=0.1, momentum=0.9)
        esper_fx.attach(optimizer, model)
        return model, head, optimizer

    model, head, optimizer = make(0)
    model.seeds["b"].germinate("affine")
    model.seeds["a"].germinate("affine")
    head(model(torch.randn(8, 4))).square().sum().backward()
    optimizer.step()
    other, other_head, other_optimizer = make(1)
    other.load_state_dict(carried(model.state_dict()))
    other_optimizer.load_state_dict(carried(optimizer.state_dict()))
    both, other_both = nn.ModuleList([head, model]), nn.ModuleList([other_head, other])
    assert names_of(other_optimizer, other_both) == names_of(optimizer, both)
    assert_same(state_by_name(other_optimizer, other_both), state_by_name(optimizer, both))


def test_one_optimizer_may_train_two_models() -> None:
    def make(seed: int, order: str) -> tuple[nn.ModuleList, Optimizer]:
        models = nn.ModuleList([new_model(seed), new_model(seed + 1)])
        optimizer = SGD(models.parameters(), lr=0.1, momentum=0.9)
        for model in models:
            esper_fx.attach(optimizer, model)
        for number in order:
            models[int(number)].seeds["b"].germinate("affine")
        return models, optimizer

    def loss(models: nn.ModuleList) -> Tensor:
        return sum(model(torch.ones(8, 4)).square().sum() for model in models)  # type: ignore[return-value]

    models, optimizer = make(0, "10")
    loss(models).backward()
    optimizer.step()
    assert models[0].clock == models[1].clock == 1
    others, other_optimizer = make(5, "01")
    others.load_state_dict(carried(models.state_dict()))
    other_optimizer.load_state_dict(carried(optimizer.state_dict()))
    assert names_of(other_optimizer, others) == names_of(optimizer, models)
    assert_same(state_by_name(other_optimizer, others), state_by_name(optimizer, models))


def test_a_detached_optimizer_saves_and_loads_as_pytorch_does() -> None:
    model = new_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    esper_fx.attach(optimizer, model).detach()
    assert "esper_names" not in optimizer.state_dict()["param_groups"][0]
    other = SGD(Net().parameters(), lr=0.5)
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
