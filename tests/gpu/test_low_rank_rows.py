"""The kernel of esper::low_rank that keeps rows on the chip, against float64; it runs on GPUs only."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from esper_fx import _torch
from esper_fx.ops.low_rank import low_rank
from tests.kernels.test_low_rank import actual, expected
from tests.support.kernels import TOLERANCE, distance, scalar, values
from tests.support.regions import compiled_region

kernels = pytest.importorskip("esper_fx.kernels.low_rank")

NUMBERS = range(len(kernels.CONFIGS), kernels.CONFIG_COUNT)

#: Rows and features: tiles that are not full, a chunk that is not full, one chunk only, several tiles for each program.
SHAPES = ((37, 1040), (3, 5, 64), (64, 16), (5003, 768), (2600, 4096))


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def weights(features: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B, as two layers hold them."""
    down = (values((rank, features), dtype, 2) / features**0.5).t()
    return down, (values((features, rank), dtype, 3) / rank**0.5).t()


@pytest.mark.parametrize("config", NUMBERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [8, 16, 32])
def test_values_and_gradients_are_those_of_float64(config: int, shape: tuple[int, ...], rank: int) -> None:
    features = shape[-1]
    dtype = torch.float16 if rank == 32 else torch.bfloat16
    activation = ("identity", "relu", "gelu", "silu")[(config + len(shape) + rank) % 4]
    x, upstream = values(shape, dtype, 0), values(shape, dtype, 1)
    down, up = weights(features, rank, dtype)
    arguments = (x, down, up, 0.5, 0.75, activation, -1, upstream)
    try:
        found = actual(*arguments, config)
    except ValueError as error:
        assert "rows that fit" in str(error)
        assert features == 4096
        return
    for name, got, want in zip(("y", "x", "A", "B"), found, expected(*arguments), strict=False):
        assert distance(got, want) <= TOLERANCE[dtype], name


@pytest.mark.parametrize(("config", "rank"), list(itertools.product(NUMBERS, (8, 16))))
def test_at_alpha_0_nothing_leaks(config: int, rank: int) -> None:
    x, upstream = values((100, 256), torch.bfloat16, 0), values((100, 256), torch.bfloat16, 1)
    down, up = (torch.full_like(weight, float("nan")) for weight in weights(256, rank, torch.bfloat16))
    y, dx, *others = actual(x, down, up, 0.0, 1.0, "gelu", -1, upstream, config)
    assert torch.equal(y, x)
    assert torch.equal(dx, upstream)
    assert not any(other.any() for other in others)


def test_it_gives_the_same_bits_again_and_for_a_view_that_is_not_aligned() -> None:
    storage = values((100 * 256 + 1,), torch.bfloat16, 0)
    x, upstream = storage[1:].view(100, 256), values((100, 256), torch.bfloat16, 1)
    arguments = (*weights(256, 16, torch.bfloat16), 0.5, 0.75, "silu", -1, upstream, NUMBERS[2])
    first = actual(x.clone(), *arguments)
    for again in (x, x.clone()):
        assert all(map(torch.equal, actual(again, *arguments), first))


@pytest.mark.parametrize("config", NUMBERS)
def test_a_compiled_region_calls_it_and_finds_it_compiled_when_it_is_loaded(config: int) -> None:
    x = values((200, 768), torch.bfloat16, 0).requires_grad_()
    down, up = ((weight.t()).contiguous().requires_grad_() for weight in weights(768, 16, torch.bfloat16))
    alpha, gate = scalar(0.5), scalar(0.75)

    class Region(nn.Module):
        def forward(self, x: Tensor, down: Tensor, up: Tensor, alpha: Tensor, gate: Tensor) -> tuple[Tensor]:
            return (torch.ops.esper.low_rank.default(x, down.t(), up.t(), alpha, gate, "gelu", -1, config)[0],)

    inputs = (x, down, up, alpha, gate)
    data = compiled_region(Region(), inputs)
    from esper_fx.kernels.low_rank_rows import rows_kernel

    assert len(_torch._unpack(data)[2]) == 2
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
