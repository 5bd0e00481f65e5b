"""Telemetry on a GPU: what a compiled model's probes measure, in pinned host memory, against an eager copy on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

import esper_fx
from esper_fx import telemetry
from esper_fx.state_fields import MEASURED
from tests.support import models
from tests.support.growing import randomize


def test_a_compiled_model_on_a_gpu_is_measured_as_an_eager_one_on_the_cpu() -> None:
    torch.compiler.reset()
    example = models.transformer(vocabulary=64, width=64, depth=4, heads=4, tokens=32, batch=4)
    nets = [copy.deepcopy(example.model).double() for _ in range(2)]
    inputs = [example.inputs, tuple(value.cuda() for value in example.inputs)]
    nets[1].cuda()
    sides = [
        esper_fx.morph(net, sites="blocks.*", example_inputs=given) for net, given in zip(nets, inputs, strict=True)
    ]
    calls = [sides[0], torch.compile(sides[1], backend="esper")]
    for model in sides:
        model.seeds["blocks.1"].germinate("bottleneck", width=4, alpha=0.5)
        randomize(model.seeds["blocks.1"].body.cpu(), seed=1)  # type: ignore[union-attr]
        model.seeds["blocks.1"].body.to(model.state.step.device)  # type: ignore[union-attr]
    calls[1](*inputs[1])
    watches = [telemetry.watch(call, every=1, decay=0.0, directions=4) for call in calls]
    assert sides[1].settle(300)
    for call, given in zip(calls, inputs, strict=True):
        example.loss(call(*given)).backward()
    for watch in watches:
        watch.flush()
    torch.cuda.synchronize()
    for mine, theirs in zip(*map(telemetry.records, sides), strict=True):
        assert theirs.samples == 1
        for field in MEASURED:
            expected = getattr(mine, field)
            assert getattr(theirs, field) == pytest.approx(expected, rel=1e-5, abs=1e-9, nan_ok=True), field
    for site in sides[0].seeds:
        torch.testing.assert_close(watches[1].sketch(site).cpu(), watches[0].sketch(site))  # type: ignore[union-attr]
