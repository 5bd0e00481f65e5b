"""esper::depthwise_conv in ATen: the values and the gradients of the blueprint's module in a seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from esper_fx.ops.depthwise_conv import depthwise_conv, depthwise_conv_backward
from tests.support.map_operators import (
    GRADIENT_LAYOUTS,
    LAYOUTS,
    TOLERANCES,
    alphas,
    assert_operator,
    assert_seed,
    convolution_body,
    gates,
    gradient_layouts,
    layouts,
    scalar,
)

sizes = st.sampled_from([1, 3, 5])
maps = st.one_of(
    st.tuples(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7)), st.tuples(sizes)),
    st.tuples(
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6)), st.tuples(sizes, sizes)
    ),
)


def run(x: Tensor, body: nn.Module, alpha: float, gate: float, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y of the operator; and the gradients of x, the body's parameters and alpha."""
    x, factor = x.detach().requires_grad_(), scalar(alpha, requires_grad=True)
    y = depthwise_conv(x, *body.parameters(), factor, scalar(gate))
    return y.detach(), list(torch.autograd.grad(y, [x, *body.parameters(), factor], grad))


@given(maps, layouts, gradient_layouts, alphas, gates, st.integers(0, 99))
def test_the_operator_is_the_seed(
    shape_and_size: tuple[tuple[int, ...], tuple[int, ...]],
    layout: str,
    grad_layout: str,
    alpha: float,
    gate: float,
    seed: int,
) -> None:
    shape, kernel_size = shape_and_size
    torch.manual_seed(seed)
    x = LAYOUTS[layout](torch.randn(shape).double())
    grad = GRADIENT_LAYOUTS[grad_layout](torch.randn(shape).double())
    body = convolution_body(shape[1], kernel_size, torch.float64)
    y, gradients = run(x, body, alpha, gate, grad)
    assert_seed(y, gradients, x, body, alpha, gate, grad, TOLERANCES[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, grad, body = (
        torch.randn(3, 8, 5, 4).to(dtype),
        torch.randn(3, 8, 5, 4).to(dtype),
        convolution_body(8, (3, 3), dtype),
    )
    y, gradients = run(x, body, 0.7, 0.3, grad)
    assert {tensor.dtype for tensor in (y, *gradients[:-1])} == {dtype}
    assert gradients[-1].dtype == torch.float32
    assert_seed(y, gradients, x, body, 0.7, 0.3, grad, TOLERANCES[dtype])


@pytest.mark.parametrize("alpha", [0.0, -0.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "weight", "bias"])
def test_at_alpha_zero_nothing_leaks(alpha: float, bad: float, where: str) -> None:
    torch.manual_seed(0)
    x, grad, body = torch.randn(2, 4, 3), torch.randn(2, 4, 3), convolution_body(4, (3,), torch.float32)
    with torch.no_grad():
        {"x": x, **dict(body.named_parameters())}[where][0] = bad
    y, (dx, *others) = run(x, body, alpha, 1.0, grad)
    assert torch.equal(y.nan_to_num(7.0, 8.0), x.nan_to_num(7.0, 8.0))
    assert torch.equal(dx, grad)
    assert all(bool((gradient == 0).all()) for gradient in others)


def test_at_gate_zero_only_the_direct_gradient_reaches_x() -> None:
    torch.manual_seed(0)
    x, grad, body = torch.randn(2, 4, 3), torch.randn(2, 4, 3), convolution_body(4, (3,), torch.float32)
    _, (dx, *others) = run(x, body, 0.5, 0.0, grad)
    assert torch.equal(dx, grad)
    assert all(bool((gradient != 0).any()) for gradient in others)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operators_are_what_pytorch_expects_of_operators(layout: str) -> None:
    torch.manual_seed(0)
    x, grad = LAYOUTS[layout](torch.randn(2, 6, 3, 4)), torch.randn(2, 6, 3, 4)
    parameters = [parameter.detach() for parameter in convolution_body(6, (3, 1), torch.float32).parameters()]
    alpha, gate = scalar(0.5), scalar(0.3)
    assert_operator(
        depthwise_conv, (x, *parameters, alpha, gate), differentiable=True, traceable=layout == "contiguous"
    )
    arguments = (grad, x, *parameters, alpha, gate, 0)
    assert_operator(depthwise_conv_backward, arguments, differentiable=False, traceable=layout == "contiguous")
