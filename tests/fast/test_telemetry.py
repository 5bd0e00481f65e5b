"""Telemetry: what is measured in the steps that are watched, how it is kept, and that nothing else changes for it."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper_fx
from esper_fx import telemetry
from esper_fx.engine.probes import Taken
from esper_fx.errors import TelemetryError, UnknownSiteError
from esper_fx.ops.probe import VALUES
from esper_fx.ops.sensor import omega
from esper_fx.ops.site_stats import reference
from esper_fx.state_fields import MEASURED
from esper_fx.telemetry.smoothing import merge_values, smoothed
from tests.support.growing import grow, randomize

Step = Callable[[], Tensor]


class Run:
    """A small network in float64 with sites after its two hidden layers, its data and its optimizer.

    Attributes:
        step: One training step; returns its loss.
    """

    def __init__(self, *, attach: bool = True, lr: float = 0.05) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.x, self.target = torch.randn(16, 6).double(), torch.randn(16, 1).double()
        self.model = esper_fx.morph(self.net, sites=["1", "3"], example_inputs=(self.x,))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        if attach:
            esper_fx.attach(self.optimizer, self.model)

    def loss(self) -> Tensor:
        return (self.model(self.x) - self.target).square().mean()

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def record(self, site: str = "3") -> telemetry.SiteRecord:
        return next(record for record in telemetry.records(self.model) if record.site == site)


def numbers(record: telemetry.SiteRecord) -> dict[str, float]:
    return {field: getattr(record, field) for field in MEASURED}


def by_hand(run: Run, site: str = "3") -> dict[str, float]:
    """The same without esper_fx's probes: a body applied by hand between the layers, differentiated by autograd."""
    seed, h = run.model.seeds[site], run.x
    x = y = None
    for i, layer in enumerate(run.net):
        h = layer(h)
        seed_here = run.model.seeds.get(str(i))
        if seed_here is not None:
            before = h
            if seed_here.live and seed_here.body is not None:
                h = h + seed_here.alpha * seed_here.body(h)
            if str(i) == site:
                x, y = before, h
    assert x is not None
    assert y is not None
    (g,) = torch.autograd.grad((h - run.target).square().mean(), y)
    x, y = x.detach(), y.detach()
    changed = seed.live and seed.alpha != 0
    return {
        "health": -float((g * (y - x)).sum()) if changed else math.nan,
        "value_mean": float(x.mean()),
        "value_std": float(x.std(correction=0)),
        "value_absmax": float(x.abs().max()),
        "nonfinite": 0.0,
        "change": float((y - x).norm() / x.norm()),
        "grad_rms": float(g.square().mean().sqrt()),
        "grad_absmax": float(g.abs().max()),
        "grad_value": float((g * x).sum()),
        "potential": math.nan,
    }


# What is measured.


@pytest.mark.parametrize("site", ["1", "3"])
@pytest.mark.parametrize("grown", [False, True])
def test_what_is_measured_is_what_flows_through_the_site(site: str, grown: bool) -> None:
    run = Run()
    if grown:
        grow(run.model, "3", "bottleneck", width=3, alpha=0.5)
    with telemetry.watch(run.model, every=1):
        expected = by_hand(run, site)
        run.step()
    record = run.record(site)
    assert numbers(record) == pytest.approx(expected, rel=1e-6, abs=1e-12, nan_ok=True)
    assert (record.samples, record.stage) == (1, "ACTIVE" if grown and site == "3" else "DORMANT")
    assert record.health == pytest.approx(run.model.seeds[site].health, nan_ok=True)


def test_health_is_what_the_loss_would_rise_by_without_the_body() -> None:
    run = Run()
    seed = grow(run.model, "3", "bottleneck", width=3, alpha=1e-4)
    with telemetry.watch(run.model, every=1):
        run.step()
    run = Run()
    seed = grow(run.model, "3", "bottleneck", width=3, alpha=1e-4)
    before = run.loss().item()
    run.model.state.write(seed.index, alpha=0.0)
    rise = run.loss().item() - before
    run.model.state.write(seed.index, alpha=1e-4)
    with telemetry.watch(run.model, every=1):
        run.step()
    assert abs(rise) > 1e-7
    assert seed.health == pytest.approx(rise, rel=1e-3)


def test_a_body_that_returns_infinity_at_alpha_0_changes_nothing() -> None:
    run = Run()
    seed = grow(run.model, "3", "affine", alpha=0.0)
    assert seed.body is not None
    with torch.no_grad():
        next(seed.body.parameters()).fill_(math.inf)
    with telemetry.watch(run.model, every=1):
        run.loss().backward()
    assert run.record().change == 0.0
    assert math.isnan(run.record().health)


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    run = Run()
    run.x[0] = math.nan
    with telemetry.watch(run.model, every=1):
        run.loss().backward()
    record = run.record("1")
    assert record.nonfinite == 8
    assert math.isfinite(record.value_mean)
    assert math.isnan(record.grad_rms)  # its gradient is not finite, so it tells nothing


def test_a_site_that_is_visited_twice_is_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.layer(torch.tanh(self.layer(x)))
            return h

    x = torch.randn(5, 4)
    net = Twice()
    model = esper_fx.morph(net, sites="layer", example_inputs=(x,))
    with telemetry.watch(model, every=1):
        model(x).sum().backward()
    first = net.layer(x)
    second = net.layer(torch.tanh(first))
    both = torch.cat([first, second]).detach().double()
    (record,) = telemetry.records(model)
    assert record.samples == 1
    assert record.value_mean == pytest.approx(both.mean().item(), rel=1e-5)
    assert record.value_std == pytest.approx(both.std(correction=0).item(), rel=1e-5)
    assert record.value_absmax == pytest.approx(both.abs().max().item(), rel=1e-6)
    (g,) = torch.autograd.grad(second.sum(), first)
    every = torch.cat([g, torch.ones_like(g)]).double()
    assert record.grad_rms == pytest.approx(every.square().mean().sqrt().item(), rel=1e-5)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), min_size=1, max_size=6), st.integers(0, 100))
def test_rows_of_one_seed_merge_to_the_statistics_of_all_its_values(rows: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(size, generator=generator).double() * 3 + 1e3 for _, size in rows]
    table = torch.stack([torch.cat([reference(value), value.sum().reshape(1)]) for value in values])
    merged = merge_values(torch.tensor([i for i, _ in rows]), table, 3)
    for i in range(3):
        mine = [value for (j, _), value in zip(rows, values, strict=True) if i == j]
        whole = torch.cat([*mine, torch.zeros(0).double()])
        expected = torch.cat([reference(whole), whole.sum().reshape(1)])
        torch.testing.assert_close(merged[i], expected, rtol=1e-9, atol=1e-9)
    assert merged.shape == (3, len(VALUES))


@given(st.lists(st.floats(allow_nan=True, width=32), min_size=1, max_size=8), st.floats(0, 0.99))
def test_smoothing_is_a_moving_average_of_what_is_finite(series: list[float], decay: float) -> None:
    fields = {field: torch.full((1,), math.nan) for field in MEASURED}
    average = math.nan
    for value in series:
        table = torch.full((len(MEASURED), 1), value, dtype=torch.float64)
        fields = {field: new.float() for field, new in smoothed(fields, table, decay).items()}
        if math.isfinite(value):
            average = value if math.isnan(average) else decay * average + (1 - decay) * value
    for field in MEASURED:
        if field == "potential":  # of sketches, which are smoothed
            average = next((value for value in reversed(series) if math.isfinite(value)), math.nan)
        assert fields[field].item() == pytest.approx(average, rel=1e-5, abs=1e-30, nan_ok=True)


# Sketches.


def map_gradient(run: Run, site: int) -> Tensor:
    """xᵀg at a site, by hand."""
    x = run.net[: site + 1](run.x).detach().requires_grad_()
    (g,) = torch.autograd.grad((run.net[site + 1 :](x) - run.target).square().mean(), x)
    return x.detach().t() @ g


def test_a_sketch_is_of_the_gradient_that_a_linear_map_would_get() -> None:
    run = Run()
    expected = omega(0, 8, 5).t() @ map_gradient(run, 3)
    with telemetry.watch(run.model, every=1, directions=5) as watch:
        assert watch.sketch("3") is None
        run.step()
        watch.flush()
        sketch = watch.sketch("3")
    assert sketch is not None
    torch.testing.assert_close(sketch, expected.float())
    assert run.record().potential == pytest.approx(expected.square().sum().item(), rel=1e-5)


def test_potential_is_right_on_average_and_ranks_sites() -> None:
    run = Run()
    with telemetry.watch(run.model, every=1, directions=64):
        run.step()
    run_again = Run()
    for site in (1, 3):
        exact = map_gradient(run_again, site).square().sum().item()
        assert run.record(str(site)).potential == pytest.approx(exact, rel=0.5)


def test_sketches_of_several_steps_and_visits_add_up_before_they_are_squared() -> None:
    run = Run()
    with telemetry.watch(run.model, every=1, decay=0.75, directions=3) as watch:
        first = omega(0, 8, 3).t() @ map_gradient(run, 3)
        run.step()
        second = omega(0, 8, 3).t() @ map_gradient(run, 3)
        run.step()
        watch.flush()
        sketch = watch.sketch("3")
    assert sketch is not None
    expected = 0.75 * first + 0.25 * second
    torch.testing.assert_close(sketch, expected.float())
    assert run.record().potential == pytest.approx(expected.square().sum().item(), rel=1e-5)


def test_values_of_other_dimensions_or_features_are_measured_without_a_sketch_of_them() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow, self.activation = nn.Linear(4, 8), nn.Linear(8, 5), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.activation(self.narrow(self.activation(self.wide(x))))
            return y

    x = torch.randn(2, 3, 4)
    net = Shared()
    model = esper_fx.morph(net, sites="activation", example_inputs=(x,))
    expected = omega(0, 8, 3).float().t() @ map_gradient_of(net, x[0])
    with telemetry.watch(model, every=1, directions=3) as watch:
        model(x[0]).sum().backward()
        watch.flush()
        sketch = watch.sketch("activation")
    (record,) = telemetry.records(model)
    assert record.samples == 1
    assert record.grad_absmax == 1.0
    assert sketch is not None
    torch.testing.assert_close(sketch, expected)


def map_gradient_of(net: Any, x: Tensor) -> Tensor:
    """xᵀg after the first activation, by hand."""
    h = net.activation(net.wide(x)).detach().requires_grad_()
    (g,) = torch.autograd.grad(net.activation(net.narrow(h)).sum(), h)
    return h.detach().t() @ g


def test_a_value_without_dimensions_is_measured() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.loss = nn.Linear(4, 1), nn.MSELoss()

        def forward(self, x: Tensor) -> Tensor:
            loss: Tensor = self.loss(self.layer(x), torch.zeros(2, 1))
            return loss

    model = esper_fx.morph(Loss(), sites="loss", example_inputs=(torch.randn(2, 4),))
    with telemetry.watch(model, every=1, directions=2):
        loss = model(torch.randn(2, 4))
        loss.backward()
    (record,) = telemetry.records(model)
    assert record.value_mean == pytest.approx(loss.item())
    assert record.grad_rms == 1.0
    assert math.isnan(record.potential)


def test_a_first_step_whose_gradients_overflow_spoils_no_sketch() -> None:
    run = Run()
    with telemetry.watch(run.model, every=1, directions=3) as watch:
        (run.loss() * math.inf).backward()
        watch.flush()
        assert watch.sketch("3") is None
        run.model.growth.tick()
        expected = omega(0, 8, 3).t() @ map_gradient(run, 3)
        run.step()
        watch.flush()
        sketch = watch.sketch("3")
    assert sketch is not None
    torch.testing.assert_close(sketch, expected.float())
    assert run.record().potential == pytest.approx(expected.square().sum().item(), rel=1e-5)


def test_where_no_gradient_flows_none_is_told_beside_one_that_flows() -> None:
    torch._dynamo.reset()
    run = Run()
    run.net[0].requires_grad_(False)
    with esper_fx.configure(workers=0, blocks=False):
        compiled = torch.compile(run.model, backend="esper")
        compiled(run.x)
        with telemetry.watch(run.model, every=1, directions=2):
            assert run.model.settle(60)
            compiled(run.x).sum().backward()
    assert run.record("3").grad_rms > 0
    assert run.record("1").samples == 1
    assert math.isnan(run.record("1").grad_rms)


def test_a_sketch_of_no_site_is_refused() -> None:
    run = Run()
    with telemetry.watch(run.model) as watch:
        with pytest.raises(UnknownSiteError, match="the model has no site 'nowhere'; it has 2"):
            watch.sketch("nowhere")
        with pytest.raises(TelemetryError, match=r"subscribe\(5\): expected a function that takes a list of records"):
            watch.subscribe(5)  # type: ignore[arg-type]


# Which steps.


def test_only_every_so_many_training_steps_are_measured() -> None:
    run = Run()
    told: list[int] = []
    with telemetry.watch(run.model, every=3) as watch:
        watch.subscribe(lambda records: told.append(records[0].sampled_at))
        for _ in range(8):
            run.step()
    assert told == [0, 3, 6]
    assert run.record().samples == 3


def test_an_evaluation_takes_the_place_of_no_training_step() -> None:
    run = Run()
    with telemetry.watch(run.model, every=1, decay=0.0):
        with torch.no_grad():
            run.loss()
        expected = by_hand(run)
        run.step()
        with torch.no_grad():
            run.loss()
    assert run.record().grad_rms == pytest.approx(expected["grad_rms"])
    assert run.record().samples == 1


def test_a_model_that_serves_is_measured_without_gradients() -> None:
    run = Run(attach=False)
    with telemetry.watch(run.model, every=2), torch.inference_mode():
        for _ in range(4):
            run.loss()
    record = run.record()
    assert record.samples == 2
    assert record.value_mean == pytest.approx(by_hand(run)["value_mean"])
    assert math.isnan(record.grad_rms)


def test_an_update_from_several_forward_passes_is_measured_once() -> None:
    run = Run()
    with telemetry.watch(run.model, every=1):
        (run.loss() + run.loss()).backward()
        run.optimizer.step()
        with torch.no_grad():
            run.loss()
    assert run.record().samples == 1
    assert not math.isnan(run.record().grad_rms)


def test_a_forward_pass_without_a_backward_pass_tells_of_values_only() -> None:
    run = Run()
    with telemetry.watch(run.model, every=1):
        run.loss()
        run.optimizer.step()
        run.loss()
        run.optimizer.step()
    assert run.record().samples == 2
    assert math.isnan(run.record().grad_rms)
    assert not math.isnan(run.record().value_std)


def test_programs_of_evaluations_and_of_training_are_steps_of_their_own() -> None:
    run = Run()
    changes, growth = run.model.growth.changes, run.model.growth
    training, evaluating, second = (SimpleNamespace(epochs={growth.handle: -1}) for _ in range(3))
    sampled: list[tuple[int, bool]] = []

    def call(program: Any) -> None:
        changes.enter(program)
        if run.model.growth.sampler.sampling:  # type: ignore[union-attr]
            run.model.growth.sampler.take(Taken((0,), torch.ones(1, len(VALUES)).double()))  # type: ignore[union-attr]
            sampled.append((run.model.clock, program is evaluating))

    with telemetry.watch(run.model, every=2):
        for _ in range(5):
            call(training)
            assert sampled[-1] == (run.model.clock // 2 * 2, False)
            measured = len(sampled)
            call(second)  # after a break of the graph
            assert len(sampled) == measured + (run.model.clock % 2 == 0)
            run.optimizer.step()
            with torch.no_grad():
                for _ in range(3):
                    call(evaluating)
    assert {clock for clock, _ in sampled} == {0, 2, 4}
    assert not any(evaluation for _, evaluation in sampled)


# Nothing else changes.


@pytest.mark.parametrize("grown", [False, True])
def test_training_is_the_same_to_the_bit(grown: bool) -> None:
    runs = [Run(), Run()]
    for run in runs:
        if grown:
            grow(run.model, "3", "bottleneck", width=3, alpha=0.5)
    telemetry.watch(runs[0].model, every=1)
    for _ in range(3):
        first, second = (run.step() for run in runs)
        assert torch.equal(first, second)
    for mine, theirs in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_memory_format_of_a_single_map_stays() -> None:
    x = torch.randn(1, 3, 6, 6).to(memory_format=torch.channels_last)
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    model = esper_fx.morph(net, sites="0", example_inputs=(x,))
    with telemetry.watch(model, every=1):
        output = model(x)
    assert telemetry.records(model)[0].samples == 1
    assert output.stride() == net(x).stride()


def test_a_layer_that_works_in_place_after_a_site_trains_on() -> None:
    x = torch.randn(4, 3)
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3))
    model = esper_fx.morph(net, sites="0", example_inputs=(x,))
    with telemetry.watch(model, every=1):
        model(x).sum().backward()
    expected = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
    (record,) = telemetry.records(model)
    assert record.value_mean == pytest.approx(net[0](x).mean().item(), rel=1e-5)
    assert math.isnan(record.grad_rms)


@pytest.mark.parametrize("seed", [None, "affine"])
def test_an_output_that_the_caller_changes_in_place_is_measured_as_it_was(seed: str | None) -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 3).double()
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model = esper_fx.morph(net, sites="2", example_inputs=(x,))
    with esper_fx.configure(workers=0):
        compiled = torch.compile(model, backend="esper")
        compiled(x)
        if seed is not None:
            assert model.seeds["2"].germinate(seed, alpha=0.5).wait(60)
            randomize(model.seeds["2"].body)  # type: ignore[arg-type]
        with telemetry.watch(model, every=1, directions=2):
            assert model.settle(60)
            output = compiled(x)
            before = output.detach().clone()
            output.mul_(2).square().sum().backward()
    (record,) = telemetry.records(model)
    g, value = 8 * before, net(x).detach()
    assert record.grad_value == pytest.approx((g * value).sum().item())
    assert record.grad_absmax == pytest.approx(g.abs().max().item())
    if seed is not None:
        assert record.health == pytest.approx(-(g * (before - value)).sum().item())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_pass_that_is_repeated_for_the_backward_pass_is_not_measured(reentrant: bool) -> None:
    run = Run()
    run.x.requires_grad_()
    plain = torch.autograd.grad(run.loss(), list(run.net.parameters()))
    with telemetry.watch(run.model, every=1):
        output = checkpoint(run.model, run.x, use_reentrant=reentrant)
        (output - run.target).square().mean().backward()
    for parameter, gradient in zip(run.net.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert math.isnan(run.record().grad_rms)


def test_a_transform_of_the_model_is_not_measured() -> None:
    run = Run()
    parameters = dict(run.model.named_parameters())
    with telemetry.watch(run.model, every=1):
        torch.func.grad(lambda p: torch.func.functional_call(run.model, p, (run.x,)).sum())(parameters)
    assert run.record().samples == 0


# Its life.


def test_a_body_that_is_new_has_no_health_yet() -> None:
    run = Run()
    seed = grow(run.model, "3", "bottleneck", width=3, alpha=0.5)
    with telemetry.watch(run.model, every=1):
        run.step()
    assert not math.isnan(seed.health)
    with esper_fx.configure(embargo_steps=0):
        seed.prune()
    run.step()
    grow(run.model, "3", "affine")
    assert math.isnan(seed.health)
    assert math.isnan(run.record().change)
    assert not math.isnan(run.record().value_std)


def test_what_was_measured_of_a_body_goes_with_it() -> None:
    run = Run()
    seed = grow(run.model, "3", "bottleneck", width=3, alpha=0.5)
    with telemetry.watch(run.model, every=1, decay=0.5) as watch:
        run.step()
        run.step()
        assert seed.health != 0
        with esper_fx.configure(embargo_steps=0):
            seed.prune()
        assert math.isnan(seed.health)
        watch.flush()  # of a step with the body
        assert run.record().samples == 2
        assert math.isnan(seed.health)
        run.step()
        run.step()
        assert math.isnan(seed.health)
        assert run.record().change == 0.0
        run.step()
        grow(run.model, "3", "affine", alpha=0.5)
        watch.flush()  # of a step without one
        assert math.isnan(run.record().change)
        expected = by_hand(run)
        run.step()
        watch.flush()
    assert run.record().change == pytest.approx(expected["change"])
    assert seed.health == pytest.approx(expected["health"])


def test_what_was_measured_before_a_checkpoint_was_loaded_is_forgotten() -> None:
    run = Run()
    saved = copy.deepcopy(run.model.state_dict())
    with telemetry.watch(run.model, every=1, directions=2) as watch:
        run.step()
        run.step()
        run.model.load_state_dict(saved)
        assert run.record().samples == 0
        assert watch.sketch("3") is None
        expected = by_hand(run)
        run.step()
    assert (run.record().samples, run.record().sampled_at) == (1, 0)
    assert run.record().grad_rms == pytest.approx(expected["grad_rms"])


def test_a_model_without_data_runs_unmeasured() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model = esper_fx.morph(net, sites="0")
    with telemetry.watch(model, every=1):
        for _ in range(3):
            assert model(torch.empty(2, 3, device="meta")).shape == (2, 3)


def test_what_was_measured_is_saved_and_copied() -> None:
    run = Run()
    with telemetry.watch(run.model, every=1):
        run.step()
        copied = copy.deepcopy(run.model)
    file = io.BytesIO()
    torch.save(run.model.state_dict(), file)
    file.seek(0)
    other = Run().model
    other.load_state_dict(torch.load(file, weights_only=True))
    for mine, theirs in zip(telemetry.records(other), telemetry.records(run.model), strict=True):
        assert mine.samples == 1
        assert numbers(mine) == pytest.approx(numbers(theirs), nan_ok=True)
    assert other.growth.sampler is None
    assert copied.growth.sampler is None


def test_a_checkpoint_from_before_there_was_telemetry_loads() -> None:
    run = Run()
    grow(run.model, "3", "affine")
    saved = run.model.state_dict()
    for key in [f"esper.state.{field}" for field in (*MEASURED, "samples", "sampled_at") if field != "health"]:
        del saved[key]
    other = Run()
    with telemetry.watch(other.model, every=1):
        other.step()
    other.model.load_state_dict(saved)
    assert other.model.seeds["3"].live
    assert other.record().samples == 0
    assert math.isnan(other.record().value_mean)


def test_closing_takes_in_the_last_step_and_ends_it() -> None:
    run = Run()
    watch = telemetry.watch(run.model, every=1)
    run.step()
    watch.close()
    run.step()
    watch.close()
    assert run.record().samples == 1
    telemetry.watch(run.model).close()


def test_a_watch_that_is_closed_while_kernels_are_prepared_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    run = Run()
    with esper_fx.configure(workers=0):
        torch.compile(run.model, backend="esper")(run.x)
        (program,) = run.model.growth.changes.programs
        watch = telemetry.watch(run.model)
        assert run.model.settle(60)
        assert program.measuring.executable(program, []) is not None
        program.measuring.drop()
        kernel = program.kernel

        def closing(variant: Any) -> Any:
            watch.close()
            return kernel(variant)

        monkeypatch.setattr(program, "kernel", closing)
        program.measuring.prepare(program, set())
    assert program.measuring._prepared is None
    assert program.measuring._pins.variants == []


def test_a_body_whose_parameters_are_frozen_and_freed_is_measured_on() -> None:
    torch._dynamo.reset()
    run = Run()
    seed = run.model.seeds["3"]
    with esper_fx.configure(workers=0):
        compiled = torch.compile(run.model, backend="esper")
        compiled(run.x)
        assert seed.germinate("affine").wait(60)
        assert seed.body is not None
        with telemetry.watch(run.model, every=1):
            for trains in (True, False, True):
                seed.body.requires_grad_(trains)
                samples = run.record().samples
                for _ in range(4):
                    compiled(run.x).sum().backward()
                    run.optimizer.step()
                    assert run.model.settle(60)
                assert run.record().samples >= samples + 2


def test_without_subscribers_flush_makes_the_last_step_known() -> None:
    run = Run()
    watch = telemetry.watch(run.model, every=1)
    run.step()
    assert run.record().samples == 0
    watch.flush()
    assert run.record().samples == 1


def test_a_subscriber_that_fails_is_called_no_more(caplog: pytest.LogCaptureFixture) -> None:
    run, calls = Run(), []

    def broken(records: list[telemetry.SiteRecord]) -> None:
        calls.append(records)
        raise ValueError("no space left")

    with telemetry.watch(run.model, every=1) as watch:
        watch.subscribe(broken)
        end = watch.subscribe(calls.append)
        run.step()
        run.step()
        assert len(calls) == 2
        assert "a subscriber to telemetry failed; it is called no more" in caplog.text
        run.step()
        end()
        end()
        run.step()
    assert len(calls) == 3


def test_a_subscriber_may_end_its_subscription_and_fail() -> None:
    run, calls = Run(), []

    def last(records: list[telemetry.SiteRecord]) -> None:
        calls.append(records)
        end()
        raise ValueError("no space left")

    with telemetry.watch(run.model, every=1) as watch:
        end = watch.subscribe(last)
        for _ in range(3):
            run.step()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "watch(every=0): expected a whole number of steps, 1 or more"),
        ({"every": True}, "watch(every=True): expected a whole number of steps, 1 or more"),
        ({"every": 2.5}, "watch(every=2.5): expected a whole number of steps, 1 or more"),
        ({"decay": 1.0}, "watch(decay=1.0): expected a number from 0 to below 1"),
        ({"decay": math.nan}, "watch(decay=nan): expected a number from 0 to below 1"),
        ({"directions": 65}, "watch(directions=65): expected a whole number from 0 to 64"),
        ({"directions": -1}, "watch(directions=-1): expected a whole number from 0 to 64"),
        ({"decay": "a"}, "watch(decay='a'): expected a number from 0 to below 1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    model = Run().model
    with pytest.raises(TelemetryError) as caught:
        telemetry.watch(model, **arguments)
    assert str(caught.value) == message
    assert model.growth.sampler is None


def test_what_cannot_be_watched_is_said() -> None:
    run = Run()
    with pytest.raises(TelemetryError, match=r"watch\(\) needs a morphed model, not a Sequential; call esper_fx.morph"):
        telemetry.watch(run.net)  # type: ignore[arg-type]
    telemetry.watch(run.model)
    with pytest.raises(TelemetryError, match=r"watched already; call close\(\) on what watch\(\) returned first"):
        telemetry.watch(run.model)


# Where it goes.


def test_json_lines_hold_every_record_and_null_for_what_is_unknown(tmp_path: Path) -> None:
    run, path = Run(), tmp_path / "sites.jsonl"
    with telemetry.watch(run.model, every=1) as watch:
        watch.subscribe(telemetry.JsonLines(path))
        for _ in range(2):
            run.step()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["site"], line["sampled_at"]) for line in lines] == list(itertools.product(("1", "3"), (0,))) + list(
        itertools.product(("1", "3"), (1,))
    )
    assert lines[-1] == {**run.record().to_dict(), "health": None, "potential": None}
    assert lines[-1]["health"] is None
    with pytest.raises(TelemetryError, match="records cannot be written to '.*no/sites.jsonl': FileNotFoundError"):
        telemetry.JsonLines(tmp_path / "no" / "sites.jsonl")


def test_tensorboard_gets_what_is_known_by_the_clock() -> None:
    written: dict[tuple[str, int], float] = {}

    class Writer:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            written[tag, step] = value

    run = Run()
    with telemetry.watch(run.model, every=2, decay=0.0) as watch:
        watch.subscribe(telemetry.TensorBoard(Writer()))
        for _ in range(3):
            run.step()
    assert written["esper/3/value_std", 2] == run.record().value_std
    assert ("esper/3/value_std", 0) in written
    assert not any("health" in tag for tag, _ in written)
