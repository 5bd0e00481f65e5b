"""Random growth inside a compiled training loop: no recompile, and every step equal to eager float64."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx.lifecycle import Stage
from tests.support import models

KINDS = {
    "low_rank": [{"rank": 4}, {"rank": 2, "activation": "gelu"}],
    "bottleneck": [{"width": 8}],
    "channel_gate": [{}],
    "depthwise_conv": [{}],
    "test_adapter": [{"width": 4}],
}


@esper_fx.blueprint("test_adapter", replace=True)
def _adapter(site: esper_fx.SiteSpec, *, width: int = 4) -> nn.Module:
    """A user's own module, with a buffer that changes: normalise, squeeze, expand."""
    return _Adapter(site.features, width, site.feature_dim)


class _Adapter(nn.Module):
    def __init__(self, features: int, width: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.down = nn.Linear(features, width)
        self.up = nn.Linear(width, features)
        self.register_buffer("calls", torch.zeros(()))
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.up(torch.tanh(self.down(x.movedim(self.dim, -1)))).movedim(-1, self.dim)


def _double_twin(model: esper_fx.MorphableModel) -> esper_fx.MorphableModel:
    """An eager float64 copy in which exactly the seeds that are live now are live."""
    twin = copy.deepcopy(model).double()
    twin.growth.changes.unfinished = False  # a copy would finish the germinations that are under way,
    twin.growth.attachment = model.growth.attachment  # and without an optimizer its own forward would move its alphas
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


def _relative(actual: Tensor, expected: Tensor, scale: float) -> float:
    return float((actual.double() - expected).norm()) / max(float(expected.norm()), scale)


def _check_step(fast: nn.Module, model: esper_fx.MorphableModel, example: models.Example) -> None:
    """Run one step compiled, and the same step on an eager float64 copy; compare loss and all gradients."""
    model.zero_grad(set_to_none=True)
    loss = example.loss(fast(*example.inputs))
    twin = _double_twin(model)  # after the forward, whose start is where changes go live
    loss.backward()
    doubled = [x.double() if x.is_floating_point() else x for x in example.inputs]
    reference = example.loss(twin(*doubled))
    reference.backward()
    assert abs(loss.item() - reference.item()) <= 1e-4 * abs(reference.item())
    expected = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == actual.keys()
    # A gradient far below the others carries their rounding: 1e-4 of it is not what float32 can promise.
    scale = 1e-3 * max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert _relative(actual[name], gradient, scale) <= 1e-4, name


def _random_event(rng: random.Random, seed: esper_fx.KasminaSeed) -> str | None:
    """Do something legal to a seed; returns what, or None if nothing is legal now."""
    if seed.stage == Stage.DORMANT:
        kind = rng.choice([name for name in KINDS if name in seed.fits()])
        seed.germinate(kind, **rng.choice(KINDS[kind]))
        return f"germinate {kind}"
    if seed.stage == Stage.GERMINATING:
        return None
    if seed.stage == Stage.INCUBATING:
        action = rng.choice(["blend", "blend", "prune"])
    elif seed.stage == Stage.BLENDING:
        action = rng.choice([None, None, "prune"])
    elif seed.stage == Stage.ACTIVE:
        action = rng.choice(["blend", "prune", "prune", "fossilize" if seed.name.endswith("0") else "prune"])
    else:
        return None
    if action == "blend":
        seed.blend(
            to=rng.choice([1.0, 0.5]), steps=rng.randint(0, 4), schedule=rng.choice(["cosine", "linear", "constant"])
        )
    elif action == "prune":
        seed.prune()
    elif action == "fossilize":
        seed.fossilize()
    return action


def _run(example: models.Example, sites: list[str], events: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    torch._dynamo.reset()
    model = esper_fx.morph(example.model, sites=sites, example_inputs=example.inputs)
    fast = torch.compile(model, backend="esper")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    esper_fx.attach(optimizer, model)
    counts: dict[str, int] = {}
    with esper_fx.configure(embargo_steps=1):
        _check_step(fast, model, example)
        with torch.compiler.set_stance("fail_on_recompile"):
            while sum(counts.values()) < events:
                for _ in range(rng.randint(1, 3)):
                    done = _random_event(rng, rng.choice(list(model.seeds.values())))
                    if done is not None:
                        counts[done] = counts.get(done, 0) + 1
                if rng.random() < 0.2:
                    assert model.settle(300)
                _check_step(fast, model, example)
                optimizer.step()
    assert model.stats().recompiles == 0
    assert "eager" not in model.stats().plans
    assert not any(event.to == Stage.ERROR for event in model.ledger)
    return counts


def _transformer() -> models.Example:
    return models.transformer(vocabulary=32, width=16, depth=3, heads=2, tokens=8, batch=2)


def _cnn() -> models.Example:
    return models.residual_cnn(channels=(8,), blocks_per_stage=3, size=8, batch=4)


def test_a_hundred_events_recompile_nothing_and_match_float64() -> None:
    counts = _run(_transformer(), ["blocks.*"], 50, seed=0)
    for action, number in _run(_cnn(), ["blocks.*"], 50, seed=1).items():
        counts[action] = counts.get(action, 0) + number
    assert sum(counts.values()) >= 100
    for expected in ("germinate low_rank", "germinate channel_gate", "blend", "prune"):
        assert counts.get(expected, 0) > 0, counts


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_events(seed: int) -> None:
    _run(_transformer() if seed % 2 else _cnn(), ["blocks.*", "blocks.*.*"] if seed % 4 else ["blocks.*"], 100, seed)
