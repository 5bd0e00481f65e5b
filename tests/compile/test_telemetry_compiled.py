"""Telemetry in a compiled model: kernels with probes measure what an eager model does, and only where they should."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx import telemetry
from esper_fx.engine.measuring import Measuring
from esper_fx.engine.sized_program import SizedProgram
from esper_fx.state_fields import MEASURED
from tests.support import models
from tests.support.growing import randomize


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


class Pair:
    """An eager model and its compiled copy, both in training, in float64."""

    def __init__(self, example: models.Example, sites: str) -> None:
        def cast(value: Tensor) -> Tensor:
            return value.double() if value.is_floating_point() else value

        self.inputs = tuple(cast(value) for value in example.inputs)
        self.loss = example.loss
        nets = [example.model.double(), copy.deepcopy(example.model).double()]
        self.models = [esper_fx.morph(net, sites=sites, example_inputs=self.inputs) for net in nets]
        self.calls: list[Any] = [self.models[0], torch.compile(self.models[1], backend="esper")]
        self.optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in self.models]
        for optimizer, model in zip(self.optimizers, self.models, strict=True):
            esper_fx.attach(optimizer, model)

    @property
    def compiled(self) -> esper_fx.MorphableModel:
        return self.models[1]

    @property
    def program(self) -> SizedProgram:
        (program,) = self.compiled.growth.changes.programs
        return program

    def germinate(self, site: str, blueprint: str, **config: Any) -> None:
        for model in self.models:
            germination = model.seeds[site].germinate(blueprint, **config)
            randomize(model.seeds[site].body, seed=1)  # type: ignore[arg-type]
            assert germination.wait(300)
            assert germination.exception() is None

    def step(self) -> list[Tensor]:
        losses = []
        for call, optimizer in zip(self.calls, self.optimizers, strict=True):
            optimizer.zero_grad()
            loss = self.loss(call(*self.inputs))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    def assert_alike(self, samples: int) -> None:
        for mine, theirs in zip(*map(telemetry.records, self.models), strict=True):
            assert theirs.samples == samples
            for field in MEASURED:
                expected = getattr(mine, field)
                assert getattr(theirs, field) == pytest.approx(expected, rel=1e-5, abs=1e-9, nan_ok=True), field


def small_transformer() -> models.Example:
    return models.transformer(vocabulary=32, width=16, depth=3, heads=2, tokens=8, batch=2)


def test_a_compiled_model_is_measured_as_an_eager_one_while_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(small_transformer(), "blocks.*")
    pair.step()
    watches = [telemetry.watch(call, every=2, decay=0.5, directions=4) for call in pair.calls]
    assert pair.compiled.settle(300)
    sampled: list[bool] = []
    original = Measuring.executable

    def noting(measuring: Measuring, program: SizedProgram, args: Any) -> Any:
        executable = original(measuring, program, args)
        sampled.append(executable is not None)
        return executable

    monkeypatch.setattr(Measuring, "executable", noting)
    for _ in range(4):
        torch.testing.assert_close(*pair.step())
    assert sampled == [True, True]  # at clocks 2 and 4: the other steps did not even ask
    pair.assert_alike(samples=1)  # the second one is known from the next step on
    assert telemetry.records(pair.compiled)[0].grad_rms > 0

    pair.germinate("blocks.1", "bottleneck", width=4, alpha=0.5)
    assert pair.compiled.settle(300)
    for _ in range(3):
        torch.testing.assert_close(*pair.step())
    for watch in watches:
        watch.flush()
    pair.assert_alike(samples=3)
    grown = telemetry.records(pair.compiled)[1]
    assert grown.change > 0.01
    assert grown.potential > 0
    for site in pair.compiled.seeds:
        mine, theirs = (watch.sketch(site) for watch in watches)
        torch.testing.assert_close(theirs, mine)
    assert not math.isnan(grown.health)
    assert sampled == [True] * 3
    assert pair.compiled.stats().recompiles == 0

    for watch in watches:
        watch.close()
    pair.step()
    assert len(sampled) == 3
    torch.testing.assert_close(*pair.step())


def test_values_that_are_changed_in_place_later_are_measured_and_train_on() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu_(self.one(x))
            result: Tensor = self.two(h)
            return result

    torch.manual_seed(0)
    pair = Pair(models.Example(Net(), (torch.randn(4, 6),), lambda y: y.square().mean()), "*")
    pair.step()
    watches = [telemetry.watch(call, every=1, decay=0.0) for call in pair.calls]
    assert pair.compiled.settle(300)
    for _ in range(2):
        torch.testing.assert_close(*pair.step())
    for watch in watches:
        watch.flush()
    pair.assert_alike(samples=2)
    one, two = telemetry.records(pair.compiled)
    assert math.isnan(one.grad_rms)
    assert two.grad_rms > 0


def test_without_kernels_with_probes_training_goes_on_unmeasured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no probes today")

    pair = Pair(small_transformer(), "blocks.1")
    pair.step()
    monkeypatch.setattr("esper_fx.engine.probes.instrument", broken)
    telemetry.watch(pair.compiled, every=1)
    assert pair.compiled.settle(300)
    assert "a program is not measured: its probes could not be prepared: no probes today" in caplog.text
    for _ in range(2):
        torch.testing.assert_close(*pair.step())
    assert telemetry.records(pair.compiled)[0].samples == 0
    assert pair.program.plan == "whole"
