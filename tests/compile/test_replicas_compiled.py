"""Two processes that train replicas of a compiled model grow it in the same steps, and learn what one learns eagerly."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import esper_fx
from esper_fx.lifecycle import Stage
from tests.support.replicas import in_replicas

WIDTH = 400  # a layer fills a bucket of DistributedDataParallel
SHORT = 3  # the step from which on two batches are a sample short


def morphed() -> esper_fx.MorphableModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    return esper_fx.morph(net.double(), sites=["1", "3"], example_inputs=batch(0)[:1])


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 8, generator=generator).double(), torch.randn(8, WIDTH, generator=generator).double()


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, call: Any, step: int, rank: int | None = None) -> None:
    """A step of two batches, of which each of two processes takes half; one that is alone takes all.

    The first gradients are not averaged by themselves. At times the second process has a sample less, and so sizes of its own.
    """
    optimizer.zero_grad()
    part = slice(None) if rank is None else slice(rank * 4, rank * 4 + 4)
    for micro in range(2):
        x, y = batch(2 * step + micro)
        if step in (SHORT, SHORT + 1):
            x, y = x[:7], y[:7]
        with contextlib.nullcontext() if micro or rank is None else call.no_sync():
            ((call(x[part]) - y[part]).square().sum() * (0.01 if rank is None else 0.02)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def grow(folder: Path, outside: bool, rank: int) -> Any:
    """Train in one of two processes; returns what happened, what the engine did, and all that was learned."""
    with esper_fx.configure(cache_dir=folder, workers=1, worker_nice=0):
        model = morphed()
        esper_fx.synchronize_growth(model)
        call: Any = DistributedDataParallel(
            model if outside else torch.compile(model, backend="esper"), bucket_cap_mb=1
        )
        call = torch.compile(call, backend="esper") if outside else call
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        esper_fx.attach(optimizer, call)
        first, second = model.seeds["1"], model.seeds["3"]
        ended = None
        step = 0
        while ended is None or step < ended + 3:
            learn(model, optimizer, call, step, rank)
            step += 1
            if step == 2:
                first.germinate("low_rank", rank=4)
                second.germinate("bottleneck", width=4)
            if first.stage == second.stage == Stage.INCUBATING:
                first.blend(steps=2)
                second.blend(steps=2)
            elif first.stage == second.stage == Stage.ACTIVE:
                first.fossilize()
                second.prune()
            elif second.body is None and first.stage == Stage.FOSSILIZED and ended is None:
                ended = step
            if rank == 1:
                model.settle(0)  # only looks, and so need not be called everywhere
        events = [(event.step, event.site, event.to.name) for event in model.ledger]
        stats = model.stats()
        learned = {name: value.numpy() for name, value in model.state_dict().items() if value.is_floating_point()}
        distributed.barrier()
        return events, stats.recompiles, step, learned


@pytest.mark.parametrize(
    "outside",
    [
        pytest.param(True, id="what wraps the model is compiled"),
        pytest.param(False, id="the model is compiled", marks=pytest.mark.nightly),  # much the same to Dynamo
    ],
)
def test_replicas_grow_in_the_same_steps_and_learn_what_one_process_learns(kernel_folder: Path, outside: bool) -> None:
    results = in_replicas(functools.partial(grow, kernel_folder, outside))
    (events, recompiles, steps, _), (others, *_) = results
    assert events == others
    assert recompiles == 0  # in the first process, whose sizes stay
    alone = morphed()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-3)
    esper_fx.attach(optimizer, alone)
    follow = {
        "INCUBATING": lambda seed: (
            seed.germinate("low_rank", rank=4) if seed.name == "1" else seed.germinate("bottleneck", width=4)
        ),
        "BLENDING": lambda seed: seed.blend(steps=2),
        "FOSSILIZED": lambda seed: seed.fossilize(),
        "EMBARGOED": lambda seed: seed.prune(),
    }
    for step in range(steps):
        for at, site, stage in events:
            if at == step and stage in follow:
                follow[stage](alone.seeds[site])
        learn(alone, optimizer, alone, step)
    expected = {name: value for name, value in alone.state_dict().items() if value.is_floating_point()}
    for *_, learned in results:
        assert learned.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                torch.from_numpy(learned[name]), value, rtol=1e-6, atol=1e-9, equal_nan=True, msg=name
            )
