"""Regions hand each other what they were compiled for, also where Inductor chooses another memory format than PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx.engine.executable import Executable


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Cached(nn.Module):
    """Residual; hands its heads on to the next block through a cache that begins empty, as attention often does."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)

    def forward(self, x_BTD: Tensor, heads_BHTE: Tensor) -> tuple[Tensor, Tensor]:
        mine = self.up(x_BTD).view(2, 6, 2, 4).transpose(1, 2)
        kept = torch.cat([torch.empty(0), mine], dim=-2)
        mixed = torch.tanh(torch.sigmoid(mine) * heads_BHTE.softmax(-1)) + heads_BHTE.sin()
        return x_BTD + self.down(mixed.transpose(1, 2).flatten(2)), kept


class Chained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Cached() for _ in range(8))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        heads = torch.zeros(2, 2, 6, 4)
        for block in self.blocks:
            x_BTD, heads = block(x_BTD, heads)
        return x_BTD, heads


def _run(model: Callable[[Tensor], Any], net: nn.Module, x: Tensor) -> list[Tensor]:
    net.zero_grad(set_to_none=True)
    first, second = model(x)
    (first.square().mean() + second.square().mean()).backward()
    return [first.detach(), second.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def test_an_empty_cache_between_regions() -> None:
    x = torch.randn(2, 6, 8)
    model = esper_fx.morph(Chained(), sites="blocks.*", example_inputs=(x,))
    expected = _run(model, model, x)
    fast = torch.compile(model, backend="esper")
    torch.testing.assert_close(_run(fast, model, x), expected)
    (program,) = model.growth.changes.programs
    _whole, blocks = program.layout.plans
    variants = program.layout.variants(blocks, (None,) * 8)
    kernels = [program.service.obtain(variant.key, variant.compile_here) for variant in variants]
    program.active = Executable(blocks, kernels, [None] * 8, [None] * 8)
    torch.testing.assert_close(_run(fast, model, x), expected)
    assert any(program.active._odd), "Inductor chose PyTorch's memory format: this test shows nothing"
    assert fast(x)[1].stride() == model(x)[1].stride()
