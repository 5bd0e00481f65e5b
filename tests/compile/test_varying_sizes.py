"""Sizes that vary from call to call: one kernel serves them, also when the model grows."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper_fx
from esper_fx import telemetry
from esper_fx.lifecycle import Stage
from esper_fx.state_fields import MEASURED
from tests.support import models
from tests.support.growing import randomize


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


class Reader(nn.Module):
    """Token ids [B, T] to logits [B, 5], for any B and T."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(models.TransformerBlock(16, 2) for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


def _ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(32, (batch, tokens), generator=torch.Generator().manual_seed(batch * tokens))


def _gradients(model: nn.Module, run: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    logits = run(ids)
    F.cross_entropy(logits, ids.sum(1) % 5).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_right(model: nn.Module, fast: nn.Module, sizes: Sequence[tuple[int, int]]) -> None:
    for batch, tokens in sizes:
        actual, expected = (_gradients(model, run, _ids(batch, tokens)) for run in (fast, model))
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-8, atol=1e-10)
        assert actual[1].keys() == expected[1].keys()
        for name, gradient in expected[1].items():
            torch.testing.assert_close(actual[1][name], gradient, rtol=1e-7, atol=1e-10, msg=name)


def test_one_kernel_serves_all_sizes_while_the_model_grows_and_is_measured() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = esper_fx.morph(Reader().double(), sites="blocks.*", example_inputs=(_ids(2, 5),))
    fast = torch.compile(model, backend="esper", dynamic=True)
    _assert_right(model, fast, [(3, 7), (2, 5), (6, 2), (4, 19)])
    assert model.stats().programs == 1
    foreground = model.stats().foreground_compiles
    seed = model.seeds["blocks.1"]
    assert seed.germinate("attention").wait(300)
    randomize(seed.body)
    _assert_right(model, fast, [(4, 3), (2, 11)])
    assert model.stats().plans == ("blocks",)
    seed.blend(to=0.7, steps=0)
    assert model.settle(300)
    compiled = model.stats().kernels_compiled
    _assert_right(model, fast, [(5, 4), (2, 2), (3, 33)])
    assert seed.stage == Stage.ACTIVE
    stats = model.stats()
    assert (stats.plans, stats.programs, stats.recompiles) == (("whole",), 1, 0)
    assert (stats.foreground_compiles, stats.kernels_compiled) == (foreground, compiled)

    twin = copy.deepcopy(model)
    for each, run in ((model, fast), (twin, twin)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
        esper_fx.attach(optimizer, each)
        watch = telemetry.watch(each, every=1, directions=3)
        assert each.settle(300)
        for ids in (_ids(3, 8), _ids(4, 5)):
            optimizer.zero_grad()
            F.cross_entropy(run(ids), ids.sum(1) % 5).backward()
            optimizer.step()
        watch.flush()
    for mine, theirs in zip(telemetry.records(twin), telemetry.records(model), strict=True):
        assert mine.samples == theirs.samples == 2
        for field in MEASURED:
            assert getattr(theirs, field) == pytest.approx(getattr(mine, field), rel=1e-5, abs=1e-9, nan_ok=True), field


def test_sizes_for_which_a_kernel_is_not_right_get_one_of_their_own() -> None:
    """PyTorch convolves few maps in another way than many."""
    example = models.residual_cnn(channels=(8,), blocks_per_stage=1, size=8, batch=4)
    model = esper_fx.morph(example.model.requires_grad_(False), sites="blocks.*", example_inputs=example.inputs)
    fast = torch.compile(model, backend="esper", dynamic=True)
    for batch in (4, 3, 20, 2, 24):
        _assert_same_maps(model, fast, batch)
    assert model.stats().programs == 2
    compiled = model.stats().foreground_compiles
    assert model.seeds["blocks.0"].germinate("depthwise_conv").wait(300)
    nn.init.normal_(next(model.seeds["blocks.0"].body.parameters()))
    for batch in (4, 3, 20, 2, 24):
        _assert_same_maps(model, fast, batch)
    assert (model.stats().programs, model.stats().foreground_compiles) == (2, compiled)


def _assert_same_maps(model: nn.Module, fast: nn.Module, batch: int) -> None:
    x = torch.randn(batch, 3, 8, 8)
    state = copy.deepcopy(model.state_dict())
    actual = fast(x)
    model.load_state_dict(state)
    torch.testing.assert_close(actual, model(x), rtol=1e-4, atol=1e-4)


class Halves(nn.Module):
    """Needs a size that its input does not show: half of a product."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[: x.shape[0] // 2].sin(), x[x.shape[0] // 2 :].cos()]) * self.weight


def test_a_body_that_is_for_fixed_sizes_only_has_kernels_for_each() -> None:
    @esper_fx.blueprint("test_halves", replace=True)
    def halves(site: esper_fx.SiteSpec) -> nn.Module:
        return Halves(site.features)

    net = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 4))
    model = esper_fx.morph(net, sites="1", example_inputs=(torch.randn(3, 2, 4),))
    fast = torch.compile(model, backend="esper", dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 4, 4)
        torch.testing.assert_close(fast(x), model(x))
    assert model.stats().programs == 1
    germination = model.seeds["1"].germinate("test_halves")
    assert germination.wait(300)
    assert germination.exception() is None
    nn.init.ones_(model.seeds["1"].body.weight)
    for rows in (3, 5, 3):
        x = torch.randn(rows, 4, 4)
        torch.testing.assert_close(fast(x), model(x))
    assert model.stats().plans == ("whole", "whole")


class Short(nn.Module):
    """Another function for more than four rows."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() * self.weight if x.shape[0] <= 4 else x.cos() * self.weight


def test_a_body_that_does_something_else_for_other_sizes() -> None:
    @esper_fx.blueprint("test_short", replace=True)
    def short(site: esper_fx.SiteSpec) -> nn.Module:
        return Short(site.features)

    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), sites="1", example_inputs=(torch.randn(3, 4),))
    fast = torch.compile(model, backend="esper", dynamic=True)
    for rows in (3, 7):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(fast(x), model(x))
    compiled = model.stats().foreground_compiles
    assert model.seeds["1"].germinate("test_short").wait(300)
    nn.init.ones_(model.seeds["1"].body.weight)
    for rows in (3, 7, 4, 9):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(fast(x), model(x))
    assert model.stats().programs == 2
    assert model.stats().foreground_compiles == compiled + 1
