"""Fused operators in compiled regions: whole models with them, and the measurement that chooses them.

Without a GPU the operators are their ATen references, which Inductor compiles: what is shown is that an operator lives in a
region, is differentiated, serialised, and keyed. Kernels are tested in tests/kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch

import esper_fx
from esper_fx.engine import build, choice
from esper_fx.passes.lower import Candidate, candidates
from tests.support import models
from tests.support.variants import grown, region_of

KINDS = {
    "blocks.0": ("low_rank", {"rank": 4, "activation": "gelu"}),
    "blocks.1": ("low_rank", {"rank": 2, "scale": 3.0}),
}
MAP_KINDS = {
    "blocks.0": ("channel_gate", {}),
    "blocks.1": ("depthwise_conv", {}),
    "blocks.2": ("low_rank", {"rank": 3}),
}


def _grow(example: models.Example, kinds: dict[str, tuple[str, dict[str, object]]]) -> esper_fx.MorphableModel:
    model = esper_fx.morph(example.model, sites=list(kinds), example_inputs=example.inputs)
    for site, (name, config) in kinds.items():
        model.seeds[site].germinate(name, **config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for seed in model.seeds.values():
            seed.blend(to=0.5, steps=0)
            assert seed.body is not None
            for parameter in seed.body.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model(*example.inputs)  # a tick, after which every alpha has arrived
    assert all(seed.alpha == 0.5 for seed in model.seeds.values())
    return model


def _step(
    model: torch.nn.Module, forward: Callable[..., torch.Tensor], example: models.Example
) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = example.loss(forward(*example.inputs))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("kind", ["transformer", "cnn"])
def test_a_model_with_fused_seeds_computes_what_eager_does(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    asked: list[str] = []

    def take(_: object, candidate: Candidate) -> int:
        asked.append(candidate.operator)
        return 0

    monkeypatch.setattr(build, "has_kernels", lambda inputs: True)
    monkeypatch.setattr(choice.Chooser, "__call__", take)
    example = (
        models.transformer(vocabulary=16, width=16, depth=2, heads=2, tokens=6, batch=2)
        if kind == "transformer"
        else models.residual_cnn(channels=(8,), blocks_per_stage=3, size=8, batch=2)
    )
    model = _grow(example, KINDS if kind == "transformer" else MAP_KINDS)
    eager = copy.deepcopy(model)
    expected = _step(eager, eager, example)
    torch._dynamo.reset()
    with esper_fx.configure(store=False, blocks=False):
        actual = _step(model, torch.compile(model, backend="esper"), example)
    assert model.stats().plans == ("whole",)
    assert sorted(asked) == sorted(name for name, _ in (KINDS if kind == "transformer" else MAP_KINDS).values())
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5)


def test_a_measurement_compiles_every_configuration_and_inductors_code() -> None:
    pytest.importorskip("triton")
    from esper_fx.kernels.low_rank import CONFIG_COUNT

    shape = (2, 5, 16)
    (candidate,) = candidates(region_of(grown("low_rank", shape, rank=4, activation="silu"), shape).graph)
    seen: dict[str, object] = {}

    def timer(runs: Mapping[str, Callable[[], object]]) -> Mapping[str, float]:
        seen.update({name: run() for name, run in runs.items()})
        return dict.fromkeys(runs, 1.0)

    seconds = choice.measure(candidate, timer)
    assert list(seconds) == [choice.INDUCTOR, *map(str, range(CONFIG_COUNT))]
    for gradients in seen.values():
        torch.testing.assert_close(gradients, seen[choice.INDUCTOR], rtol=1e-4, atol=1e-5)
