"""The kernels of esper::low_rank against a float64 module with a seed around it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from esper_fx import ops
from esper_fx.kernels import low_rank as kernels
from esper_fx.kernels.launch import ACTIVATIONS
from esper_fx.ops.low_rank import low_rank
from tests.support.kernels import DEVICE, TOLERANCE, alphas, distance, dtypes, gates, memory_formats, scalar, values

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}

#: Of one number, relative to it.
ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-9, torch.float16: 2**-12}

shapes = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 70)).map(lambda s: (s, -1)),
    st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 70)).map(lambda s: (s, -1)),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20)).map(lambda s: (s, 1)),
    st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 5), st.integers(1, 5)).map(lambda s: (s, 1)),
)


def expected(
    x: Tensor, down: Tensor, up: Tensor, alpha: float, gate: float, activation: str, dim: int, upstream: Tensor
) -> list[Tensor]:
    """y, and the gradients of x, A and B and alpha, all in float64."""
    x, down, up = (t.detach().double().requires_grad_() for t in (x, down, up))
    factor = torch.tensor(alpha, device=DEVICE, dtype=torch.float64, requires_grad=True)

    def body(value: Tensor) -> Tensor:
        return (FUNCTIONS[activation](value.movedim(dim, -1) @ down) @ up).movedim(-1, dim)

    y = ops.seed_forward(x, body, factor, torch.tensor(gate, device=DEVICE, dtype=torch.float64))
    y.backward(upstream.double())
    return [y.detach(), *(t.grad if t.grad is not None else torch.zeros_like(t) for t in (x, down, up, factor))]


def actual(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    alpha: float,
    gate: float,
    activation: str,
    dim: int,
    upstream: Tensor,
    config: int = 0,
) -> list[Tensor]:
    x, down, up = (t.detach().requires_grad_() for t in (x, down, up))
    factor = scalar(alpha).requires_grad_()
    y, _ = low_rank(x, down, up, factor, scalar(gate), activation, dim, config)
    y.backward(upstream)
    grads = [t.grad for t in (x, down, up, factor)]
    assert all(grad is not None for grad in grads)
    return [y.detach(), *(grad for grad in grads if grad is not None)]


@settings(max_examples=60)
@given(
    shapes,
    st.integers(1, 20),
    dtypes,
    memory_formats,
    alphas,
    gates,
    st.sampled_from(ACTIVATIONS),
    st.integers(0, len(kernels.CONFIGS) - 1),
    st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_float64(
    shape_and_dim: tuple[tuple[int, ...], int],
    rank: int,
    dtype: torch.dtype,
    memory: str,
    alpha: float,
    gate: float,
    activation: str,
    config: int,
    seed: int,
) -> None:
    shape, dim = shape_and_dim
    features = shape[dim]
    x = values(shape, dtype, seed, memory)
    upstream = values(shape, dtype, seed + 1, memory if config % 2 else "contiguous")
    down, up = values((features, rank), dtype, seed + 2) / features**0.5, values((rank, features), dtype, seed + 3)
    right = expected(x, down, up, alpha, gate, activation, dim, upstream)
    # The sums of the terms' magnitudes: where terms cancel, what is left of their rounding is large beside the result.
    magnitudes = expected(*(t.abs() for t in (x, down, up)), abs(alpha), gate, "identity", dim, upstream.abs())
    for name, got, want, magnitude in zip(
        ("y", "x", "A", "B", "alpha"),
        actual(x, down, up, alpha, gate, activation, dim, upstream, config),
        right,
        magnitudes,
        strict=True,
    ):
        # A gradient of alpha near 0 is what large terms leave: the rounding is theirs.
        tolerance = TOLERANCE[dtype] * (max(1.0, float(upstream.double().norm()) / 10) if name == "alpha" else 1.0)
        if name == "alpha":
            assert abs(float(got) - float(want)) <= tolerance * max(1.0, float((right[0] - x.double()).norm()) * 3)
        else:
            allowed = max(tolerance * want.norm(), ROUNDING[dtype] * magnitude.norm())
            assert (got.double() - want.double()).norm() <= allowed, name


@pytest.mark.parametrize("rank", [1, 8, 16, 17, 64])
def test_ranks_up_to_the_largest(rank: int) -> None:
    x, upstream = values((37, 130), torch.float32, 0), values((37, 130), torch.float32, 1)
    down, up = values((130, rank), torch.float32, 2) / 10, values((rank, 130), torch.float32, 3)
    arguments = (x, down, up, 0.75, 0.5, "gelu", -1, upstream)
    for got, want in zip(actual(*arguments)[:4], expected(*arguments)[:4], strict=True):
        assert distance(got, want) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(("rank", "dtype"), [(65, torch.float32), (4, torch.float64)])
def test_what_the_kernels_cannot_take_is_computed_without_them(
    monkeypatch: pytest.MonkeyPatch, rank: int, dtype: torch.dtype
) -> None:
    def launched(*_: object, **__: object) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(kernels, "launch", launched)
    x, upstream = values((20, 80), torch.float32, 0), values((20, 80), torch.float32, 1)
    down, up = values((80, rank), dtype, 2) / 10, values((rank, 80), dtype, 3)
    arguments = (x, down, up, 0.75, 0.5, "gelu", -1, upstream)
    for got, want in zip(actual(*arguments)[:4], expected(*arguments)[:4], strict=True):
        assert distance(got, want) <= TOLERANCE[torch.float32]


def test_many_rows_are_summed_in_parts() -> None:
    x, upstream = values((1500, 24), torch.float32, 0), values((1500, 24), torch.float32, 1)
    down, up = values((24, 4), torch.float32, 2) / 5, values((4, 24), torch.float32, 3)
    arguments = (x, down, up, 1.0, 1.0, "relu", -1, upstream)
    for got, want in zip(actual(*arguments)[:4], expected(*arguments)[:4], strict=True):
        assert distance(got, want) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["x", "A", "B"])
def test_at_alpha_zero_nothing_bad_leaks(where: str, bad: float) -> None:
    x, upstream = values((20, 24), torch.float32, 0), values((20, 24), torch.float32, 1)
    down, up = values((24, 4), torch.float32, 2), values((4, 24), torch.float32, 3)
    {"x": x, "A": down, "B": up}[where][1, 2] = bad
    y, dx, *others = actual(x, down, up, 0.0, 1.0, "gelu", -1, upstream)
    assert torch.equal(y, x.detach()) if where != "x" else torch.allclose(y, x, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(dx, upstream)
    for gradient in others:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_at_gate_zero_the_gradient_passes_as_it_is(bad: float) -> None:
    x, upstream = values((20, 24), torch.float32, 0), values((20, 24), torch.float32, 1)
    down, up = values((24, 4), torch.float32, 2), values((4, 24), torch.float32, 3)
    down[3, 1] = bad
    assert torch.equal(actual(x, down, up, 1.0, 0.0, "identity", -1, upstream)[1], upstream)


def test_a_wide_residual_stream_with_narrow_weights() -> None:
    """As under autocast: the value at the site is float32, products are taken in bfloat16."""
    x, upstream = values((24, 64), torch.float32, 0), values((24, 64), torch.float32, 1)
    down, up = values((64, 8), torch.bfloat16, 2) / 8, values((8, 64), torch.bfloat16, 3)
    arguments = (x, down, up, 1.0, 1.0, "silu", -1, upstream)
    results = actual(*arguments)
    assert results[0].dtype == results[1].dtype == torch.float32
    assert results[2].dtype == results[3].dtype == torch.bfloat16
    for got, want in zip(results[:4], expected(*arguments)[:4], strict=True):
        assert distance(got, want) <= TOLERANCE[torch.bfloat16]


def test_the_same_values_give_the_same_bits() -> None:
    x, upstream = values((300, 40), torch.float32, 0), values((300, 40), torch.float32, 1)
    down, up = values((40, 4), torch.float32, 2), values((4, 40), torch.float32, 3)
    runs = [actual(x, down, up, 0.5, 1.0, "gelu", -1, upstream) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_without_rows_there_are_no_rows() -> None:
    x = values((0, 24), torch.float32, 0)
    y, dx, ddown, dup, dalpha = actual(
        x, values((24, 4), torch.float32, 2), values((4, 24), torch.float32, 3), 1.0, 1.0, "relu", -1, x
    )
    assert y.shape == dx.shape == (0, 24)
    assert not ddown.any()
    assert not dup.any()
    assert float(dalpha) == 0.0
