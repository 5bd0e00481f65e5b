"""esper::channel_gate in ATen: the values and the gradients of the blueprint's module in a seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper_fx.blueprints.channel_gate import ChannelGate
from esper_fx.ops.channel_gate import channel_gate, channel_gate_backward
from tests.support.map_operators import (
    GRADIENT_LAYOUTS,
    LAYOUTS,
    TOLERANCES,
    alphas,
    assert_operator,
    assert_seed,
    channel_gate_body,
    gateable_map,
    gates,
    gradient_layouts,
    layouts,
    scalar,
)

shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=3)).map(
    lambda parts: (parts[0], parts[1], *parts[2])
)


def run(x: Tensor, body: ChannelGate, alpha: float, gate: float, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y of the operator; and the gradients of x, the body's parameters and alpha."""
    x, factor = x.detach().requires_grad_(), scalar(alpha, requires_grad=True)
    y = channel_gate(x, *body.parameters(), factor, scalar(gate))[0]
    return y.detach(), list(torch.autograd.grad(y, [x, *body.parameters(), factor], grad))


@given(shapes, st.integers(1, 4), layouts, gradient_layouts, alphas, gates, st.integers(0, 99))
def test_the_operator_is_the_seed(
    shape: tuple[int, ...], hidden: int, layout: str, grad_layout: str, alpha: float, gate: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = LAYOUTS[layout](gateable_map(shape, torch.float64))
    grad = GRADIENT_LAYOUTS[grad_layout](gateable_map(shape, torch.float64))
    body = channel_gate_body(shape, hidden, torch.float64)
    y, gradients = run(x, body, alpha, gate, grad)
    assert_seed(y, gradients, x, body, alpha, gate, grad, TOLERANCES[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape = (3, 8, 5, 4)
    x, grad, body = gateable_map(shape, dtype), gateable_map(shape, dtype), channel_gate_body(shape, 4, dtype)
    y, gradients = run(x, body, 0.7, 0.3, grad)
    assert {tensor.dtype for tensor in (y, *gradients[:-1])} == {dtype}
    assert gradients[-1].dtype == torch.float32
    assert_seed(y, gradients, x, body, 0.7, 0.3, grad, TOLERANCES[dtype])


@pytest.mark.parametrize("alpha", [0.0, -0.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "the first layer", "the second layer"])
def test_at_alpha_zero_nothing_leaks(alpha: float, bad: float, where: str) -> None:
    torch.manual_seed(0)
    x, grad, body = torch.randn(2, 4, 3), torch.randn(2, 4, 3), channel_gate_body((2, 4, 3), 4, torch.float32)
    with torch.no_grad():
        {"x": x, "the first layer": body.down.weight, "the second layer": body.up.bias}[where][0] = bad
    y, (dx, *others) = run(x, body, alpha, 1.0, grad)
    assert torch.equal(y.nan_to_num(7.0, 8.0), x.nan_to_num(7.0, 8.0))
    assert torch.equal(dx, grad)
    assert all(bool((gradient == 0).all()) for gradient in others)


def test_at_gate_zero_only_the_direct_gradient_reaches_x() -> None:
    torch.manual_seed(0)
    x, grad, body = torch.randn(2, 4, 3), torch.randn(2, 4, 3), channel_gate_body((2, 4, 3), 4, torch.float32)
    _, (dx, *others) = run(x, body, 0.5, 0.0, grad)
    assert torch.equal(dx, grad)
    assert all(bool((gradient != 0).any()) for gradient in others)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operators_are_what_pytorch_expects_of_operators(layout: str) -> None:
    torch.manual_seed(0)
    x, grad = LAYOUTS[layout](torch.randn(2, 6, 3, 4)), torch.randn(2, 6, 3, 4)
    parameters = [parameter.detach() for parameter in channel_gate_body((2, 6, 3, 4), 5, torch.float32).parameters()]
    alpha, gate = scalar(0.5), scalar(0.3)
    assert_operator(channel_gate, (x, *parameters, alpha, gate), differentiable=True, traceable=layout == "contiguous")
    _, *kept = channel_gate(x, *parameters, alpha, gate)
    arguments = (grad, x, *kept, parameters[0], parameters[2], alpha, gate, 0)
    assert_operator(channel_gate_backward, arguments, differentiable=False, traceable=layout == "contiguous")


def test_without_save_nothing_is_kept_and_no_gradient_is_to_be_had() -> None:
    x, body = torch.ones(2, 4, 3).double(), channel_gate_body((2, 4, 3), 4, torch.float64)
    with torch.no_grad():
        y, *kept = channel_gate(x, *body.parameters(), scalar(1.0), scalar(1.0), save=False)
        assert torch.equal(y, channel_gate(x, *body.parameters(), scalar(1.0), scalar(1.0))[0])
    assert [tuple(tensor.shape) for tensor in kept] == [(0, 4), (0, 4), (0, 4)]
    assert not any(tensor.requires_grad for tensor in channel_gate(x, *body.parameters(), scalar(1.0), scalar(1.0))[1:])
    message = "esper::channel_gate was called with save=False, but a gradient is asked for; pass save=True"
    with pytest.raises(RuntimeError, match=message):
        channel_gate(x, *body.parameters(), scalar(1.0), scalar(1.0), save=False)
