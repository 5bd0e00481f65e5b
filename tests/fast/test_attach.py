"""attach: seeds' parameters join and leave the optimizer, its schedulers keep working, the clock counts its steps."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

import esper_fx
from esper_fx.lifecycle import Stage

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: Adam(p, lr=0.01),
    "adamw": lambda p: AdamW(p, lr=0.01, foreach=True),
}
SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "lambda": lambda o: LambdaLR(o, lambda step: 0.9**step),
    "one cycle": lambda o: OneCycleLR(o, max_lr=0.5, total_steps=20),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=20),
}


def new_model() -> esper_fx.MorphableModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    return esper_fx.morph(net, sites=["0", "1", "2"], example_inputs=(torch.randn(2, 4),))


def held(optimizer: Optimizer) -> list[int]:
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]


def body_parameters(model: esper_fx.MorphableModel, site: str) -> list[Tensor]:
    body = model.seeds[site].body
    assert body is not None
    return list(body.parameters())


def step(model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None = None) -> None:
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 12).reshape(3, 4)).square().sum().backward()
    optimizer.step()
    if scheduler is not None:
        scheduler.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_join_once_and_leave_with_their_state(name: str) -> None:
    model = new_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    esper_fx.attach(optimizer, model)
    before = held(optimizer)
    assert len(before) == len(set(before)) == 4  # dormant seeds own nothing
    model.seeds["1"].germinate("low_rank", rank=2)
    mine = body_parameters(model, "1")
    assert held(optimizer) == before + [id(parameter) for parameter in mine]
    assert len(optimizer.param_groups) == 1
    step(model, optimizer)
    assert all(parameter in optimizer.state for parameter in mine)
    hosts = {id(p): {k: copy.deepcopy(v) for k, v in s.items()} for p, s in optimizer.state.items() if id(p) in before}
    model.seeds["1"].prune()
    assert held(optimizer) == before
    assert not any(parameter in optimizer.state for parameter in mine)
    assert len(optimizer.state) == 4
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(hosts[id(parameter)][key]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_joined_body_is_trained_as_if_it_had_been_there_from_the_start(name: str) -> None:
    model = new_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    esper_fx.attach(optimizer, model)
    model.seeds["1"].germinate("low_rank", rank=2)
    reference = copy.deepcopy(model)
    static = OPTIMIZERS[name](reference.parameters())
    start = [parameter.detach().clone() for parameter in body_parameters(model, "1")]
    for _ in range(3):
        step(model, optimizer)
        step(reference, static)
    trained = body_parameters(model, "1")
    assert any(not torch.equal(a, b) for a, b in zip(start, trained, strict=True))
    for mine, theirs in zip(trained, body_parameters(reference, "1"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_site_that_germinates_again_brings_new_parameters_without_the_old_ones_state() -> None:
    model = new_model()
    optimizer = Adam(model.parameters(), lr=0.01)
    esper_fx.attach(optimizer, model)
    with esper_fx.configure(embargo_steps=0):
        for _ in range(3):
            model.seeds["1"].germinate("low_rank", rank=2)
            mine = body_parameters(model, "1")
            assert len(held(optimizer)) == 4 + len(mine)
            assert not any(parameter in optimizer.state for parameter in mine)
            step(model, optimizer)
            assert all(float(optimizer.state[parameter]["step"]) == 1.0 for parameter in mine)
            model.seeds["1"].prune()
    assert len(held(optimizer)) == 4


def test_parameters_join_the_group_of_their_site() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {"a": nn.Sequential(nn.Linear(4, 4), nn.Tanh()), "b": nn.Sequential(nn.Linear(4, 4), nn.Tanh())}
    )

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = net

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["b"](self.parts["a"](x))

    model = esper_fx.morph(Both(), sites="parts.*.1", example_inputs=(torch.randn(2, 4),))
    groups = [{"params": model.parts["a"].parameters()}, {"params": model.parts["b"].parameters(), "lr": 0.5}]
    optimizer = SGD(groups, lr=0.1)
    esper_fx.attach(optimizer, model)
    for site in model.seeds:
        model.seeds[site].germinate("low_rank")
    for number, site in enumerate(["parts.a.1", "parts.b.1"]):
        ids = {id(parameter) for parameter in optimizer.param_groups[number]["params"]}
        assert ids.issuperset(map(id, body_parameters(model, site)))
        assert len(ids) == 2 + len(body_parameters(model, site))


def test_options_make_a_group_of_the_seeds_own() -> None:
    model = new_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    esper_fx.attach(optimizer, model, lr=0.01, weight_decay=0.5)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 0]
    step(model, optimizer)  # an empty group is no problem
    model.seeds["0"].germinate("low_rank")
    model.seeds["1"].germinate("bottleneck")
    own = optimizer.param_groups[1]
    assert (own["lr"], own["weight_decay"]) == (0.01, 0.5)
    assert {id(p) for p in own["params"]} == {id(p) for site in "01" for p in body_parameters(model, site)}
    model.seeds["0"].prune()
    assert {id(p) for p in own["params"]} == {id(p) for p in body_parameters(model, "1")}


@pytest.mark.parametrize(
    ("when", "options"),  # a group of their own is made before any scheduler, as attach says
    [
        ("before", {}),
        ("after", {}),
        ("after germination", {}),
        ("after", {"lr": 0.05}),
        ("after germination", {"lr": 0.05}),
    ],
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_made_before_or_after_keep_working(name: str, when: str, options: dict[str, float]) -> None:
    model, plain = new_model(), nn.Linear(1, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = SCHEDULERS[name](optimizer) if when == "before" else None
    esper_fx.attach(optimizer, model, **options)
    scheduler = scheduler or (SCHEDULERS[name](optimizer) if when == "after" else None)
    model.seeds["1"].germinate("low_rank")
    scheduler = scheduler or SCHEDULERS[name](optimizer)
    twin = SGD([{"params": plain.weight}, {"params": plain.bias, **options}], lr=0.1)
    expected = SCHEDULERS[name](twin)
    for number in range(10):
        group = optimizer.param_groups[-1]
        assert {id(p) for p in group["params"]}.issuperset(
            map(id, body_parameters(model, "1") if model.seeds["1"].body else [])
        )
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in twin.param_groups][
            -len(optimizer.param_groups) :
        ]
        step(model, optimizer, scheduler)
        twin.step()
        expected.step()
        if number == 4:
            model.seeds["1"].prune()
        if number == 6:
            model.seeds["0"].germinate("low_rank")
    assert optimizer.param_groups[0]["lr"] != 0.1


def test_a_scheduler_that_looks_at_the_loss_keeps_working() -> None:
    model = new_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    esper_fx.attach(optimizer, model)
    model.seeds["1"].germinate("low_rank")
    for _ in range(2):
        step(model, optimizer)
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_the_clock_counts_optimizer_steps_and_not_forward_calls() -> None:
    model = new_model()
    x = torch.randn(2, 4)
    model(x)
    model(x)
    assert model.clock == 2
    optimizer = SGD(model.parameters(), lr=0.1)
    attachment = esper_fx.attach(optimizer, model)
    for _ in range(3):
        model(x)
    assert model.clock == 2
    for _ in range(2):
        step(model, optimizer)
    assert model.clock == 4
    assert int(model.state.step) == 4
    attachment.detach()
    step(model, optimizer)
    assert model.clock == 5  # the forward call; the optimizer's step no longer counts
    optimizer.step()
    assert model.clock == 5


def test_alpha_advances_with_optimizer_steps() -> None:
    model = new_model()
    optimizer = SGD(model.parameters(), lr=0.0)
    esper_fx.attach(optimizer, model)
    seed = model.seeds["1"]
    seed.germinate("low_rank", alpha=0.0)
    seed.blend(to=1.0, steps=4, schedule="linear")
    alphas = []
    for _ in range(5):
        model(torch.randn(2, 4))  # a forward without a step changes nothing
        step(model, optimizer)
        alphas.append(seed.alpha)
    assert alphas == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert seed.stage == Stage.ACTIVE


def test_bodies_that_are_there_already_join_at_once_and_only_once() -> None:
    model = new_model()
    model.seeds["0"].germinate("low_rank")
    optimizer = SGD(model.parameters(), lr=0.1)  # holds the body already
    before = held(optimizer)
    attachment = esper_fx.attach(optimizer, model)
    assert held(optimizer) == before
    attachment.detach()
    hosts = [p for name, p in model.named_parameters() if not name.startswith("esper.")]
    other = SGD(hosts, lr=0.1)
    esper_fx.attach(other, model)
    assert held(other) == [id(p) for p in (*hosts, *body_parameters(model, "0"))]


def test_after_detach_nothing_joins_and_another_optimizer_may_come() -> None:
    model = new_model()
    first = SGD(model.parameters(), lr=0.1)
    attachment = esper_fx.attach(first, model)
    model.seeds["0"].germinate("low_rank")
    joined = held(first)
    attachment.detach()
    model.seeds["1"].germinate("low_rank")
    assert held(first) == joined
    second = Adam(model.parameters(), lr=0.1)
    esper_fx.attach(second, model)
    model.seeds["2"].germinate("low_rank")
    assert set(held(second)).issuperset(map(id, body_parameters(model, "2")))
    assert held(first) == joined
    attachment.detach()  # twice does no harm, and does not untie the second
    assert model.growth.attachment is not None


def test_an_optimizer_that_is_gone_is_let_go() -> None:
    model = new_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    attachment = esper_fx.attach(optimizer, model)
    del optimizer
    gc.collect()
    assert attachment.optimizer is None
    model.seeds["0"].germinate("low_rank")
    model.seeds["0"].prune()
    esper_fx.attach(SGD(model.parameters(), lr=0.1), model)


def test_when_its_optimizer_is_gone_the_clock_counts_forward_calls_again() -> None:
    model = new_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    esper_fx.attach(optimizer, model)
    step(model, optimizer)
    del optimizer
    gc.collect()
    model.seeds["0"].germinate("low_rank")
    model.seeds["0"].blend(to=0.5, steps=2)
    for _ in range(3):
        model(torch.randn(2, 4))
    assert model.clock == 4
    assert model.seeds["0"].stage is Stage.ACTIVE
    assert model.seeds["0"].alpha == 0.5


def test_an_optimizer_does_not_keep_its_model_alive() -> None:
    model = new_model()
    other = nn.Linear(1, 1)
    optimizer = SGD([*other.parameters(), *model.parameters()], lr=0.1)
    esper_fx.attach(optimizer, model)
    growth = model.growth
    clock = growth.clock
    optimizer.step()
    assert growth.clock == clock + 1


def test_a_gradient_scaler_that_skips_a_step_does_not_move_the_clock() -> None:
    model = new_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    esper_fx.attach(optimizer, model)
    model(torch.randn(2, 4)).sum().backward()
    assert model.clock == 0  # no step was taken
    optimizer.step(lambda: model(torch.randn(2, 4)).sum())
    assert model.clock == 1


def test_a_copy_of_the_model_is_not_attached() -> None:
    model = new_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    esper_fx.attach(optimizer, model)
    other = copy.deepcopy(model)
    assert other.growth.attachment is None
    other.seeds["0"].germinate("low_rank")
    assert len(held(optimizer)) == 4
    esper_fx.attach(SGD(other.parameters(), lr=0.1), other)


def test_what_torch_compile_returns_stands_for_the_model() -> None:
    model = new_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    esper_fx.attach(optimizer, torch.compile(model, backend="esper"))
    model.seeds["1"].germinate("low_rank", rank=2)
    step(model, optimizer)
    step(model, optimizer)
    assert {id(parameter) for parameter in body_parameters(model, "1")} <= set(held(optimizer))
    assert model.clock == 2


def test_a_reason_that_is_no_text_is_refused() -> None:
    seed = new_model().seeds["1"]
    seed.germinate("affine")
    with pytest.raises(TypeError, match=r"prune\(why=3\) at site '1': expected a text"):
        seed.prune(3)  # type: ignore[arg-type]
    assert seed.stage is Stage.INCUBATING
