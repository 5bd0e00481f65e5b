"""The kernels of esper::sensor against float64, and their Omega against the one of 64-bit arithmetic, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper_fx.kernels import sensor as kernels
from esper_fx.ops.sensor import key_of, omega, sensor
from tests.support.kernels import DEVICE, TOLERANCE, distance, dtypes, memory_formats, values

seeds = st.integers(-(2**63), 2**63 - 1)

shapes = st.one_of(
    st.tuples(st.integers(1, 90), st.integers(1, 70)).map(lambda s: (s, -1)),
    st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 70)).map(lambda s: (s, -1)),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20)).map(lambda s: (s, 1)),
    st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 5), st.integers(1, 5)).map(lambda s: (s, 1)),
)


def expected(x: Tensor, g: Tensor, seed: int, k: int, dim: int) -> Tensor:
    rows, gradients = (t.double().movedim(dim, -1).reshape(-1, x.shape[dim]) for t in (x, g))
    return (rows @ omega(seed, x.shape[dim], k, x.device)).t() @ gradients


@settings(max_examples=25)
@given(seeds, st.integers(1, 150), st.sampled_from([1, 2, 5, 16, 17, 64]), st.integers(0, len(kernels.CONFIGS) - 1))
def test_omega_in_registers_is_the_one_of_the_reference(seed: int, features: int, k: int, config: int) -> None:
    """A row that is 1 in one place and 0 elsewhere projects to a row of Omega."""
    unit = torch.eye(features, device=DEVICE)
    made = kernels.project(unit, key_of(seed), k, -1, config)
    right = omega(seed, features, k).to(DEVICE)
    assert torch.equal(made > 0, right > 0)
    assert torch.allclose(made.abs(), torch.full_like(made, k**-0.5), rtol=1e-6, atol=0)


@settings(max_examples=40)
@given(
    shapes,
    dtypes,
    memory_formats,
    memory_formats,
    st.sampled_from([1, 3, 8, 16, 33, 64]),
    st.integers(0, len(kernels.CONFIGS) - 1),
    st.integers(0, 1000),
)
def test_sketch_is_that_of_float64(
    shape_and_dim: tuple[tuple[int, ...], int],
    dtype: torch.dtype,
    memory: str,
    gradient_memory: str,
    k: int,
    config: int,
    seed: int,
) -> None:
    shape, dim = shape_and_dim
    x, g = values(shape, dtype, seed, memory), values(shape, dtype, seed + 1, gradient_memory)
    sketch = sensor(x, g, seed, k, dim, config)
    assert sketch.dtype == torch.float32
    assert distance(sketch, expected(x, g, seed, k, dim)) <= TOLERANCE[dtype]


def test_value_and_gradient_of_different_dtypes() -> None:
    """As under autocast."""
    x, g = values((40, 30), torch.float32, 0), values((40, 30), torch.bfloat16, 1)
    assert distance(sensor(x, g, 3, 8), expected(x, g, 3, 8, -1)) <= TOLERANCE[torch.bfloat16]


def test_float16_does_not_overflow_where_the_sum_of_a_row_does() -> None:
    x, g = torch.full((8, 256), 3e4, dtype=torch.float16, device=DEVICE), values((8, 256), torch.float16, 1)
    seed = max(range(50), key=lambda s: float(omega(s, 256, 1).sum().abs()))
    assert float(omega(seed, 256, 1).sum().abs()) * 3e4 > 65504
    assert distance(sensor(x, g, seed, 1), expected(x, g, seed, 1, -1)) <= TOLERANCE[torch.float16]


def test_many_rows_are_summed_in_parts() -> None:
    x, g = values((1500, 24), torch.float32, 0), values((1500, 24), torch.float32, 1)
    sketch = sensor(x, g, 7, 4)
    assert distance(sketch, expected(x, g, 7, 4, -1)) <= TOLERANCE[torch.float32]
    assert torch.equal(sketch, sensor(x, g, 7, 4))


def test_without_rows_the_sketch_is_zero() -> None:
    x = values((0, 24), torch.float32, 0)
    assert torch.equal(sensor(x, x, 7, 4), torch.zeros(4, 24, device=DEVICE))


def test_configuration_that_does_not_exist() -> None:
    x = values((4, 24), torch.float32, 0)
    with pytest.raises(ValueError, match=f"config=99: expected 0 to {len(kernels.CONFIGS) - 1}"):
        sensor(x, x, 7, 4, -1, 99)
