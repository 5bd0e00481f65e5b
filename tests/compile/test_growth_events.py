"""Random growth inside a compiled training loop: no recompile, and every step equal to eager float64.

A ReLU has two gradients at 0: where rounding decides which one a value near 0 gets, gradients of float32 and float64 differ
by a few per cent, whoever computes them. So a step that is not that of the float64 reference must be, as closely, that of
the reference at a point next to it, as far away as rounding takes a float32.
"""

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
    "gated_mlp": [{"width": 8}],
    "affine": [{}],
    "conv": [{"width": 4}],
    "attention": [{"heads": 2}],
    "sequence": [{"parts": ["affine", ("low_rank", {"rank": 2})]}],
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


#: Points looked at next to a step's own, and how far away they are: what a chain of layers rounds a float32 by.
NEIGHBOURS, ROUNDING = 200, 2.0**-21


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _same(loss: Tensor, actual: dict[str, Tensor], reference: Tensor, expected: dict[str, Tensor]) -> bool:
    """Whether loss and all gradients are those of a reference within 1e-4."""
    # A gradient far below the others carries their rounding: 1e-4 of it is not what float32 can promise.
    floor = 1e-3 * max(float(gradient.norm()) for gradient in expected.values())
    return abs(loss.item() - reference.item()) <= 1e-4 * abs(reference.item()) and all(
        float((actual[name].double() - gradient).norm()) <= 1e-4 * max(float(gradient.norm()), floor)
        for name, gradient in expected.items()
    )


def _rounded_otherwise(twin: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Move a float64 model and its inputs to a point next to theirs."""
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1 + ROUNDING * torch.randn_like(parameter))
    return [x * (1 + ROUNDING * torch.randn_like(x)) if x.is_floating_point() else x for x in inputs]


def _check_step(fast: nn.Module, model: esper_fx.MorphableModel, example: models.Example) -> bool:
    """Run one step compiled, and the same step on an eager float64 copy; compare loss and all gradients.

    Returns whether it was at its own point that the reference was met.
    """
    model.zero_grad(set_to_none=True)
    loss = example.loss(fast(*example.inputs))
    loss.backward()
    actual = _gradients(model)
    inputs = [x.double() if x.is_floating_point() else x for x in example.inputs]
    for neighbour in range(NEIGHBOURS):
        near = _double_twin(model)  # after the forward, whose start is where changes go live
        reference = example.loss(near(*(_rounded_otherwise(near, inputs) if neighbour else inputs)))
        reference.backward()
        expected = _gradients(near)
        assert expected.keys() == actual.keys()
        if _same(loss, actual, reference, expected):
            return neighbour == 0
    raise AssertionError(f"neither the gradients of float64 nor of {NEIGHBOURS} points next to it")


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
    at_its_point: list[bool] = []
    with esper_fx.configure(embargo_steps=1):
        at_its_point.append(_check_step(fast, model, example))
        with torch.compiler.set_stance("fail_on_recompile"):
            while sum(counts.values()) < events:
                for _ in range(rng.randint(1, 3)):
                    done = _random_event(rng, rng.choice(list(model.seeds.values())))
                    if done is not None:
                        counts[done] = counts.get(done, 0) + 1
                if rng.random() < 0.2:
                    assert model.settle(300)
                at_its_point.append(_check_step(fast, model, example))
                optimizer.step()
    assert at_its_point.count(False) <= 0.1 * len(at_its_point)
    assert model.stats().recompiles == 0
    assert "eager" not in model.stats().plans
    assert not any(event.to == Stage.ERROR for event in model.ledger)
    return counts


def _transformer() -> models.Example:
    return models.transformer(vocabulary=32, width=16, depth=3, heads=2, tokens=8, batch=2)


def _cnn() -> models.Example:
    return models.residual_cnn(channels=(8,), blocks_per_stage=3, size=8, batch=4)


@pytest.mark.long
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
