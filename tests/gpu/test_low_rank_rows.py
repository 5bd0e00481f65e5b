"""The kernel of esper::low_rank that keeps rows on the chip, in compiled regions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from esper_fx import _torch
from esper_fx.artifact import unpack
from esper_fx.ops.low_rank import low_rank
from tests.support.kernels import TOLERANCE, distance, layer_weights, scalar, values
from tests.support.regions import compiled_region

kernels = pytest.importorskip("esper_fx.kernels.low_rank")


@pytest.mark.parametrize("config", range(len(kernels.CONFIGS), kernels.CONFIG_COUNT))
def test_a_compiled_region_calls_it_and_finds_it_compiled_when_it_is_loaded(config: int) -> None:
    x = values((200, 768), torch.bfloat16, 0).requires_grad_()
    down, up = ((weight.t()).contiguous().requires_grad_() for weight in layer_weights(768, 16, torch.bfloat16))
    alpha, gate = scalar(0.5), scalar(0.75)

    class Region(nn.Module):
        def forward(self, x: Tensor, down: Tensor, up: Tensor, alpha: Tensor, gate: Tensor) -> tuple[Tensor]:
            return (torch.ops.esper.low_rank.default(x, down.t(), up.t(), alpha, gate, "gelu", -1, config)[0],)

    inputs = (x, down, up, alpha, gate)
    data = compiled_region(Region(), inputs)
    from esper_fx.kernels.low_rank_rows import rows_kernel

    assert len(unpack(data).hidden) == 2
    rows_kernel.device_caches.clear()
    loaded = _torch.load_graph(data)
    compiled = len(rows_kernel.device_caches[torch.cuda.current_device()][0])
    assert compiled == 2
    (y,) = loaded(*inputs)
    found = torch.autograd.grad(y, (x, down, up), torch.ones_like(y))
    assert len(rows_kernel.device_caches[torch.cuda.current_device()][0]) == compiled
    eager, _ = low_rank(x, down.t(), up.t(), alpha, gate, "gelu", -1, config)
    for got, want in zip(found, torch.autograd.grad(eager, (x, down, up), torch.ones_like(y)), strict=True):
        assert distance(got, want) <= TOLERANCE[torch.bfloat16]
