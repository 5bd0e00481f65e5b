"""What esper::site_stats, esper::low_rank_stats and esper::sensor compute in ATen, and that they are well-formed operators."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from esper_fx.ops.low_rank import low_rank, low_rank_stats
from esper_fx.ops.sensor import MAX_DIRECTIONS, omega, sensor
from esper_fx.ops.site_stats import FIELDS, site_stats


def test_statistics_are_what_plain_arithmetic_says() -> None:
    numbers = [3.5, -7.25, 1e6, 1e6 + 1, 0.0, math.nan, -math.inf, math.inf, 2.0]
    finite = [number for number in numbers if math.isfinite(number)]
    mean = math.fsum(finite) / len(finite)
    squares = math.fsum((number - mean) ** 2 for number in finite)
    stats = dict(zip(FIELDS, site_stats(torch.tensor(numbers)).tolist(), strict=True))
    assert stats == pytest.approx(
        {"count": 6, "mean": mean, "m2": squares, "absmax": 1e6 + 1, "nonfinite": 3}, rel=1e-14
    )


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_statistics_of_nothing_are_zero(shape: tuple[int, ...]) -> None:
    assert site_stats(torch.empty(shape)).tolist() == [0, 0, 0, 0, 0]


def test_statistics_where_nothing_is_finite() -> None:
    assert site_stats(torch.tensor([math.nan, math.inf])).tolist() == [0, 0, 0, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_order_in_memory_does_not_matter(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    right = site_stats(x)
    assert right.dtype == torch.float64
    for view in (x.permute(2, 0, 1), x.contiguous(memory_format=torch.contiguous_format).transpose(0, 2)):
        assert torch.allclose(site_stats(view), right, rtol=1e-14)
    assert torch.allclose(site_stats(x[:, ::2]), site_stats(x[:, ::2].clone()), rtol=1e-14)
    assert site_stats(x[:1].expand(3, 6, 5))[0] == 90


def test_no_gradient_flows_through_statistics_and_sketches() -> None:
    x = torch.randn(6, 5, requires_grad=True)
    assert not site_stats(x).requires_grad
    assert not sensor(x, x, 0, 2).requires_grad
    (x.sum() + site_stats(x)[1] + sensor(x, x, 0, 2).sum()).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


def arguments(shape: tuple[int, ...], dim: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    down = torch.randn(shape[dim], 2, generator=generator, requires_grad=True)
    up = torch.randn(2, shape[dim], generator=generator, requires_grad=True)
    return x, down, up, torch.tensor(0.5, requires_grad=True), torch.tensor(1.0)


@pytest.mark.parametrize(("shape", "dim"), [((4, 5, 6), -1), ((2, 6, 3, 3), 1)])
def test_low_rank_with_statistics_is_low_rank_and_statistics(shape: tuple[int, ...], dim: int) -> None:
    inputs = arguments(shape, dim)
    y, hidden = low_rank(*inputs, "silu", dim)
    y_too, hidden_too, stats = low_rank_stats(*inputs, "silu", dim)
    assert torch.equal(y, y_too)
    assert torch.equal(hidden, hidden_too)
    assert torch.equal(stats, site_stats(inputs[0]))
    assert not stats.requires_grad
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for one, other in zip(
        torch.autograd.grad(y, inputs[:4], upstream), torch.autograd.grad(y_too, inputs[:4], upstream), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("shape", "dim"), [((7, 6), -1), ((2, 3, 6), 2), ((2, 6, 3, 2), 1)])
def test_sketch_is_the_gradient_of_a_linear_map_seen_through_omega(shape: tuple[int, ...], dim: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)
    ((x.movedim(dim, -1) @ weight) * g.movedim(dim, -1)).sum().backward()
    assert weight.grad is not None
    sketch = sensor(x, g, 11, 4, dim)
    assert sketch.dtype == torch.float32
    assert torch.allclose(sketch.double(), omega(11, 6, 4).t() @ weight.grad, rtol=1e-5, atol=1e-6)


def test_more_directions_than_kernels_take() -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(4))
    assert sensor(x, x, 0, MAX_DIRECTIONS + 1).shape == (MAX_DIRECTIONS + 1, 6)


def test_omega_is_the_identity_on_average() -> None:
    """An entry off the diagonal is a mean of signs: 2,000 seeds times 4 directions leave a deviation of 0.011."""
    mean = torch.stack([omega(seed, 10, 4) @ omega(seed, 10, 4).t() for seed in range(2000)]).mean(0)
    assert torch.allclose(mean.diagonal(), torch.ones(10, dtype=torch.float64), rtol=1e-12)
    off = mean[~torch.eye(10, dtype=torch.bool)]
    assert float(off.abs().max()) < 5 * 0.0112
    assert float(off.std()) == pytest.approx(0.0112, rel=0.5)


def test_omega_of_one_seed_has_no_pattern() -> None:
    """2**18 signs: their sum, and those of products of neighbours in either direction, are within 4 deviations."""
    signs = omega(5, 4096, 64).sign()
    for product in (signs, signs[1:] * signs[:-1], signs[:, 1:] * signs[:, :-1], signs * omega(6, 4096, 64).sign()):
        assert abs(float(product.sum())) < 4 * product.numel() ** 0.5


def test_omega_depends_on_the_lower_32_bits_of_the_seed() -> None:
    assert torch.equal(omega(7, 20, 3), omega(7 + (5 << 32), 20, 3))
    assert torch.equal(omega(-1, 20, 3), omega(2**32 - 1, 20, 3))
    assert not torch.equal(omega(7, 20, 3), omega(8, 20, 3))


def test_operators_are_well_formed() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    for tensor in (x, x.detach().bfloat16()[:, ::2]):
        torch.library.opcheck(site_stats, (tensor,))
    torch.library.opcheck(sensor, (x, torch.randn(4, 6), 3, 2))
    torch.library.opcheck(sensor, (torch.randn(2, 6, 3), torch.randn(2, 6, 3), 3, 2, 1))
    torch.library.opcheck(low_rank_stats, (*arguments((4, 6), -1), "gelu"))
    torch.library.opcheck(low_rank_stats, (*arguments((2, 6, 3), 1), "relu", 1))
