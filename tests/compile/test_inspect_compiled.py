"""Looking into a compiled model: what its programs run, and that nobody notices."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

import esper_fx
from esper_fx import inspect
from esper_fx.lifecycle import Stage
from tests.support.inspecting import footprint, looked_at

SITES = ("1", "2")


def network() -> esper_fx.MorphableModel:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])
    return esper_fx.morph(net, sites=list(SITES), example_inputs=(torch.ones(4, 8),))


def test_regions_are_shown_with_their_kernels_and_seeds_and_nothing_changes() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    model = network()
    fast = torch.compile(model, backend="esper")
    assert inspect.summary(fast).programs == ()
    fast(x)
    (program,) = inspect.summary(fast).programs
    assert (program.plan, program.sites) == ("whole", SITES)
    (dormant,) = program.regions
    assert (dormant.live, dormant.dormant) == ((), SITES)
    assert model.settle(300)

    germination = model.seeds["1"].germinate("affine")
    now = inspect.summary(fast)
    assert [(change.site, change.change) for change in now.pending] == [("1", "comes")]
    assert now.programs[0].regions == program.regions  # it runs what it ran
    assert germination.wait(300)
    fast(x)
    assert model.settle(300)
    fast(x)

    result, before = fast(x), footprint(model)
    now = inspect.summary(fast)
    texts = [str(now), inspect.report(fast), inspect.to_dot(fast), inspect.to_json(fast)]
    assert footprint(model) == before
    assert now.engine == model.stats()
    assert torch.equal(fast(x), result)

    (program,) = now.programs
    (region,) = program.regions
    assert (program.plan, program.complete, now.settled) == ("whole", True, True)
    assert (region.live, region.dormant) == (("1",), ("2",))
    assert now.morphology == {"1": "affine"}
    assert region.kernel != dormant.kernel
    assert region.nodes > dormant.nodes  # with the body
    (running,) = model.growth.changes.programs
    assert [region.kernel] == [variant.key.digest for variant in running.running.variants]  # type: ignore[union-attr]
    assert running.running.variants[0].key in running.service.cache  # type: ignore[union-attr]
    assert len(region.kernel) == 64
    assert region.kernel[:12] in texts[0]
    assert region.kernel not in texts[0]
    assert region.kernel in texts[1]
    assert now.to_dict()["programs"][0]["regions"][0]["kernel"] == region.kernel


def test_a_training_that_is_watched_from_another_thread_goes_as_if_it_were_not() -> None:
    expected, _ = _train(network(), watched=False)
    results, seen = _train(network(), watched=True)
    for actual, wanted in zip(results, expected, strict=True):
        assert torch.equal(actual, wanted)
    assert {program.plan for now in seen for program in now.programs} >= {"whole"}
    assert {seed.stage for now in seen for seed in now.seeds} >= {"DORMANT", "ACTIVE"}
    for now in seen:
        for program in now.programs:
            in_regions = [site for region in program.regions for site in (*region.live, *region.dormant)]
            assert sorted(in_regions) == sorted(program.sites if program.regions else ())


def _train(model: esper_fx.MorphableModel, *, watched: bool) -> tuple[list[Tensor], list[inspect.Summary]]:
    """Some steps with a seed that grows, goes and grows again; the losses and final parameters, and what was seen."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    fast = torch.compile(model, backend="esper")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    esper_fx.attach(optimizer, model)
    results: list[Tensor] = []
    seen: list[inspect.Summary] = []

    def look() -> None:
        seen.append(inspect.summary(fast))
        inspect.report(fast)
        inspect.to_json(inspect.graph(fast, detail="operations"))

    def steps(number: int) -> None:
        for _ in range(number):
            loss = fast(x).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            results.append(loss.detach().clone())

    looking = looked_at(look) if watched else contextlib.nullcontext([])
    with looking as problems, esper_fx.configure(embargo_steps=0):
        steps(5)
        for site in SITES:
            seed = model.seeds[site]
            assert seed.germinate("affine").wait(300)
            assert model.settle(300)
            steps(5)
            seed.blend(to=1.0, steps=3)
            steps(10)
            assert seed.stage is Stage.ACTIVE
        model.seeds["1"].prune()
        steps(1)
        assert model.settle(300)
        steps(5)
    assert problems == []
    assert model.stats().recompiles == 0
    return [*results, *(parameter.detach().clone() for parameter in model.parameters())], seen
