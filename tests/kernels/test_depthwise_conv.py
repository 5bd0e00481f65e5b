"""The kernels of esper::depthwise_conv against a seed in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from esper_fx.kernels import depthwise_conv as kernels
from esper_fx.kernels import tiles
from esper_fx.ops.depthwise_conv import depthwise_conv
from tests.support.examples import examples
from tests.support.kernels import DEVICE, dtypes
from tests.support.map_operators import (
    GRADIENT_LAYOUTS,
    LAYOUTS,
    TOLERANCES,
    alphas,
    assert_seed,
    convolution_body,
    far_apart,
    gates,
    gradient_layouts,
    layouts,
    scalar,
)

sizes = st.sampled_from([1, 3, 5])
sides = st.integers(1, 9)
maps = st.one_of(
    st.tuples(st.tuples(st.integers(1, 3), st.integers(1, 18), st.integers(1, 40)), st.tuples(sizes)),
    st.tuples(
        st.tuples(st.integers(1, 2), st.integers(1, 18), sides, sides),
        st.sampled_from([(3, 3), (1, 1), (1, 3), (5, 3)]),
    ),
)


def run(
    x: Tensor, body: nn.Module, alpha: float, gate: float, grad: Tensor, config: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """y of the operator, from its kernels; and the gradients of x, the body's parameters and alpha."""
    x, grad = x.detach().to(DEVICE).requires_grad_(), grad.to(DEVICE)
    parameters = [parameter.detach().to(DEVICE).requires_grad_() for parameter in body.parameters()]
    factor = scalar(alpha).to(DEVICE).requires_grad_()
    y = depthwise_conv(x, *parameters, factor, scalar(gate).to(DEVICE), config)
    gradients = torch.autograd.grad(y, [x, *parameters, factor], grad)
    return y.detach().cpu(), [gradient.cpu() for gradient in gradients]


@examples(60)
@given(
    maps,
    dtypes,
    layouts,
    gradient_layouts,
    alphas,
    gates,
    st.sampled_from(range(len(kernels.CONFIGS))),
    st.integers(0, 99),
)
def test_the_kernels_compute_the_seed(
    shape_and_size: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype,
    layout: str,
    grad_layout: str,
    alpha: float,
    gate: float,
    config: int,
    seed: int,
) -> None:
    shape, kernel_size = shape_and_size
    torch.manual_seed(seed)
    x = LAYOUTS[layout](torch.randn(shape).to(dtype))
    grad = GRADIENT_LAYOUTS[grad_layout](torch.randn(shape).to(dtype))
    body = convolution_body(shape[1], kernel_size, dtype)
    y, gradients = run(x, body, alpha, gate, grad, config)
    assert {tensor.dtype for tensor in (y, *gradients[:-1])} == {dtype}
    assert_seed(y, gradients, x, body, alpha, gate, grad, TOLERANCES[dtype])


@pytest.mark.parametrize("programs", [1, 16], ids=["one part of many steps", "many parts"])
@pytest.mark.parametrize("layout", ["contiguous", "channels innermost"])
def test_a_plane_may_take_many_tiles(layout: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PROGRAMS", programs)
    torch.manual_seed(0)
    x = LAYOUTS[layout](torch.randn(1, 2, 11, 66))
    grad, body = torch.randn(1, 2, 11, 66), convolution_body(2, (3, 3), torch.float32)
    y, gradients = run(x, body, 0.7, 0.3, grad, config=1)
    assert_seed(y, gradients, x, body, 0.7, 0.3, grad, TOLERANCES[torch.float32])


@pytest.mark.parametrize("where", ["x", "weight", "bias"])
def test_at_alpha_zero_nothing_leaks(where: str) -> None:
    torch.manual_seed(0)
    x, grad, body = torch.randn(2, 4, 9), torch.randn(2, 4, 9), convolution_body(4, (3,), torch.float32)
    with torch.no_grad():
        spoiled = {"x": x, **dict(body.named_parameters())}[where]
        spoiled[0], spoiled[1] = float("nan"), float("inf")
    y, (dx, *others) = run(x, body, 0.0, 1.0, grad)
    assert torch.equal(y.view(torch.int32), x.view(torch.int32))
    assert torch.equal(dx, grad)
    assert all(bool((gradient == 0).all()) for gradient in others)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_gate_zero_only_the_direct_gradient_reaches_x(layout: str) -> None:
    torch.manual_seed(0)
    x, grad, body = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), convolution_body(4, (3, 1), torch.float32)
    _, (dx, *others) = run(LAYOUTS[layout](x), body, 0.5, 0.0, grad)
    assert torch.equal(dx, grad)
    assert all(bool((gradient != 0).any()) for gradient in others)


def test_float64_is_computed_in_float64() -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(2, 4, 9).double(), torch.randn(2, 4, 9).double()
    body = convolution_body(4, (3,), torch.float64)
    y, gradients = run(x, body, 0.7, 0.3, grad)
    assert_seed(y, gradients, x, body, 0.7, 0.3, grad, TOLERANCES[torch.float64])


def test_an_empty_batch_has_empty_results_and_no_gradients() -> None:
    x, body = torch.empty(0, 4, 3), convolution_body(4, (3,), torch.float32)
    y, (dx, *others) = run(x, body, 0.5, 1.0, x)
    assert y.shape == dx.shape == x.shape
    assert all(bool((gradient == 0).all()) for gradient in others)


@pytest.mark.skipif(DEVICE != "cpu", reason="the map lies in a sparse file")
def test_offsets_may_pass_2_to_the_31(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, grad = far_apart(tmp_path / "map", (1, 3, 4)), torch.randn(1, 3, 4).half()
    body = convolution_body(3, (3,), torch.float16)
    y, gradients = run(x, body, 0.7, 0.3, grad)
    assert_seed(y, gradients, x, body, 0.7, 0.3, grad, TOLERANCES[torch.float16])
