"""The training loops that benchmarks time: the same model and data, plain or morphed, compiled by either backend."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import torch
from torch import Tensor, nn

import esper_fx
from esper_fx import blueprints
from esper_fx.engine.service import service
from esper_fx.lifecycle import Stage
from esper_fx.site import SiteSpec
from tests.support import models

BLOCKS = "blocks.*"
# A block in the middle, of the kind that is repeated: what is grown first where one site is grown.
MIDDLE = {"transformer": "blocks.3", "cnn": "blocks.4", "gpt2-small": "blocks.6", "resnet-50": "blocks.9"}
LEARNING_RATE = 1e-4
SETTLE_S = 300.0

# What `dormant` morphs: at least 8 sites each, finer than whole blocks.
FINE_SITES: dict[str, Sequence[str]] = {
    "transformer": ("blocks.*.attention", "blocks.*.feed_forward"),
    "cnn": ("blocks.*",),
    "gpt2-small": ("blocks.*.attention", "blocks.*.feed_forward"),
    "resnet-50": ("blocks.*",),
}

MODELS: dict[str, Callable[..., models.Example]] = {
    "transformer": models.transformer,
    "cnn": models.residual_cnn,
    # As large as GPT-2 small and ResNet-50: 124 and 28 million parameters.
    "gpt2-small": partial(models.transformer, vocabulary=50_304, width=768, depth=12, heads=12, tokens=1024, batch=8),
    "resnet-50": partial(
        models.residual_cnn, channels=(64, 128, 256, 512), blocks_per_stage=4, classes=1000, size=112, batch=32
    ),
}


def case(name: str, seed: int = 0, device: str = "cpu") -> models.Example:
    """The model called ``name`` with its inputs and loss; equal seeds give equal parameters and data."""
    model, inputs, loss = MODELS[name](seed=seed)
    return models.Example(model.to(device), tuple(value.to(device) for value in inputs), loss)


@dataclass
class Loop:
    """A training loop, one step at a time.

    Attributes:
        net: What owns the parameters: a plain module or a ``MorphableModel``.
        forward: ``net`` itself or compiled.
        inputs: The model's arguments, the same in every step.
        loss: Maps the output to a scalar.
        optimizer: AdamW over the parameters of ``net``.
        autocast: Whether forward passes run under autocast to bfloat16, on a GPU.
    """

    net: nn.Module
    forward: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    loss: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    autocast: bool = False

    def gradients(self) -> Tensor:
        """Forward and backward, no update; returns the loss and leaves the gradients in place."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self.forward(*self.inputs))
        loss.backward()
        return loss

    def forward_backward(self) -> None:
        """Forward and backward; the gradients are dropped, the parameters stay."""
        self.gradients()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One training step: forward, backward, update; on a GPU, until the device has done it."""
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.inputs[0].is_cuda:
            torch.cuda.synchronize()


def plain_loop(case: models.Example, net: nn.Module | None = None, *, mode: str = "default") -> Loop:
    """Training of ``net``, by default a copy of the case's model, under ``torch.compile`` in this mode."""
    net = copy.deepcopy(case.model) if net is None else net
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE)
    return Loop(net, torch.compile(net, mode=mode), case.inputs, case.loss, optimizer)


def esper_loop(case: models.Example, sites: str | Sequence[str] = BLOCKS) -> Loop:
    """Training of a morphed copy of the case's model, compiled by backend "esper", with the optimizer attached."""
    net = copy.deepcopy(case.model)
    net.train()
    model = esper_fx.morph(net, sites=sites if isinstance(sites, str) else list(sites), example_inputs=case.inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    esper_fx.attach(optimizer, model)
    return Loop(model, torch.compile(model, backend="esper"), case.inputs, case.loss, optimizer)


def settle(loop: Loop) -> None:
    """Run the loop's first step, wait for all background work, and step until the best plan runs.

    Raises:
        RuntimeError: If the engine does not end up on its best plan.
    """
    loop.step()
    loop.net.settle(SETTLE_S)
    for _ in range(3):
        loop.step()
    if not on_best_plan(loop):
        raise RuntimeError(f"after settle() the engine does not run the plan 'whole': {loop.net.stats()}")


def wait_for_a_worker() -> None:
    """Wait until a worker process of the compiler is up: it is, when a process has trained for a while."""
    compiler = service().compiler
    while compiler is not None and not compiler.ready():
        sleep(0.1)


def on_best_plan(loop: Loop) -> bool:
    """Whether nothing is under way and every program runs its plan ``whole``."""
    plans = loop.net.stats().plans
    return not loop.net.pending and bool(plans) and all(plan == "whole" for plan in plans)


def make_active(loop: Loop, grow: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """Germinate a blueprint at each site, give every body weights that do something, bring it to ACTIVE with alpha 1.

    Args:
        loop: An esper loop.
        grow: Site to blueprint and its parameters.
    """
    model = loop.net
    germinations = [model.seeds[site].germinate(name, **config) for site, (name, config) in grow.items()]
    for germination in germinations:
        germination.wait(SETTLE_S)
    loop.step()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site in grow:
            for parameter in model.seeds[site].body.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            model.seeds[site].blend(to=1.0, steps=1, schedule="constant")
    for _ in range(4):
        loop.step()
    stages = {site: model.seeds[site].stage for site in grow}
    if any(stage is not Stage.ACTIVE for stage in stages.values()):
        raise RuntimeError(f"not every seed became ACTIVE: {stages}")
    settle(loop)


def steps_until_live(loop: Loop, seed: esper_fx.KasminaSeed, most: int) -> int:
    """Step until ``seed``, which is germinating, computes; returns the number of steps that took.

    Raises:
        RuntimeError: If the germination failed or takes more than ``most`` steps.
    """
    for steps in range(1, most + 1):
        loop.step()
        if seed.stage is Stage.ERROR:
            raise RuntimeError(f"the germination at {seed.site.name} failed: {seed.error}")
        if seed.stage not in (Stage.DORMANT, Stage.GERMINATING):
            return steps
    raise RuntimeError(f"the seed at {seed.site.name} is not live after {most} steps: {loop.net.stats()}")


class Grown(nn.Module):
    """What a user writes by hand instead of a live seed: the module, and the body's output added to its own."""

    def __init__(self, inner: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.body = body

    def forward(self, *inputs: Tensor) -> Tensor:
        x = self.inner(*inputs)
        return x + self.body(x)


def grow_by_hand(net: nn.Module, site: str, body: nn.Module) -> None:
    """Replace the submodule called ``site`` by ``Grown(submodule, body)``, in place."""
    parent, _, name = site.rpartition(".")
    owner = net.get_submodule(parent)
    setattr(owner, name, Grown(getattr(owner, name), body))


def site_of(case: models.Example, name: str) -> SiteSpec:
    """What flows out of the submodule called ``name``, seen in one eager forward of the case's model."""
    seen: list[Tensor] = []
    net = copy.deepcopy(case.model)
    handle = net.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        net(*case.inputs)
    handle.remove()
    value = seen[0]
    feature_dim = 1 if value.ndim >= 4 else value.ndim - 1
    return SiteSpec(name, tuple(value.shape), value.dtype, value.device, feature_dim)


def build_body(case: models.Example, site: str, blueprint: str, **config: Any) -> nn.Module:
    """The module that a seed at ``site`` would become, without a seed."""
    return blueprints.get(blueprint).build(site_of(case, site), config, seed=0)


def stats_dict(loop: Loop) -> dict[str, Any]:
    """The engine's statistics as plain data."""
    return dataclasses.asdict(loop.net.stats())


@contextmanager
def empty_store() -> Iterator[Path]:
    """Inside, kernels come from and go to a store that was empty before."""
    with (
        tempfile.TemporaryDirectory(prefix="esper-fx-bench-", ignore_cleanup_errors=True) as folder,
        esper_fx.configure(cache_dir=folder),
    ):
        yield Path(folder)
