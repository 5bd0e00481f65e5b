"""What a seed computes: selected, not multiplied, with a gate on the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from esper_fx import ops
from esper_fx.ops import probe
from esper_fx.passes.canonical import qualified_name

BAD = {
    "inf": lambda x: x / 0.0,
    "nan": lambda x: x * float("nan"),
    "nan gradient": lambda x: (x - x).sqrt(),
    "inf gradient": lambda x: (x - x).abs().pow(0.25) * 1e38,
    "overflow": lambda x: (x * 1e30) * 1e30,
}
finite = st.floats(-3, 3, allow_nan=False)


def scalar(value: float) -> Tensor:
    return torch.tensor(value)


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
@pytest.mark.parametrize("gate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.0, -0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_at_alpha_zero_the_seed_is_the_identity_whatever_its_body_returns(
    body: Callable[[Tensor], Tensor], gate: float, alpha: float, dtype: torch.dtype
) -> None:
    x = torch.tensor([-1.5, 0.0, 2.0], dtype=dtype, requires_grad=True)
    upstream = torch.tensor([3.0, -7.0, 0.25], dtype=dtype)
    y = ops.seed_forward(x, body, scalar(alpha), scalar(gate))
    y.backward(upstream)
    assert torch.equal(y, x)
    assert y.dtype == dtype
    assert x.grad is not None
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize("name", BAD)
def test_the_bad_bodies_are_bad(name: str) -> None:
    x = torch.tensor([-1.5, 0.0, 2.0], requires_grad=True)
    value = BAD[name](x)
    value.sum().backward()
    assert x.grad is not None
    assert not (x.grad.isfinite().all() and value.isfinite().all())


@pytest.mark.parametrize("body", [BAD["nan gradient"], torch.sin], ids=["nan gradient", "sin"])
def test_at_gate_zero_nothing_flows_back_through_the_body(body: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([-1.5, 0.0, 2.0], requires_grad=True)
    upstream = torch.tensor([3.0, -7.0, 0.25])
    y = ops.seed_forward(x, body, scalar(1.0), scalar(0.0))
    y.backward(upstream)
    assert torch.equal(y, x + body(x))
    assert torch.equal(x.grad, upstream)  # type: ignore[arg-type]


def test_at_gate_zero_the_body_itself_still_learns() -> None:
    x, weight = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor(0.5, requires_grad=True)
    ops.seed_forward(x, lambda inner: inner * weight, scalar(0.5), scalar(0.0)).sum().backward()
    assert float(weight.grad) == 0.5 * 3.0  # type: ignore[arg-type]


@pytest.mark.parametrize("gate", [0.25, 0.5, 1.0, 2.0])
def test_a_fractional_gate_scales_the_gradient_through_the_body(gate: float) -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    ops.seed_forward(x, lambda inner: 4.0 * inner, scalar(0.5), scalar(gate)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0 + 0.5 * 4.0 * gate] * 2


def reference(
    x: list[float], weight: list[float], alpha: float, gate: float, upstream: list[float]
) -> tuple[list[float], list[float], list[float]]:
    """y, dL/dx and dL/dweight of y = x + alpha * weight * x̃², in plain Python, by hand.

    x̃ = gate * x + (1 - gate) * stop(x) has the value x and the derivative gate, so that
    dy/dx = 1 + alpha * weight * 2x * gate and dy/dweight = alpha * x².
    """
    y = [xi if alpha == 0 else xi + alpha * wi * xi * xi for xi, wi in zip(x, weight, strict=True)]
    dx = [u * (1 + alpha * wi * 2 * xi * gate) for xi, wi, u in zip(x, weight, upstream, strict=True)]
    dw = [u * alpha * xi * xi for xi, u in zip(x, upstream, strict=True)]
    return y, dx, dw


@given(
    rows=st.lists(st.tuples(finite, finite, finite), min_size=1, max_size=4),
    alpha=st.one_of(st.just(0.0), st.floats(-2, 2, width=32)),
    gate=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32)),
)
def test_values_and_gradients_are_the_formulas(
    rows: list[tuple[float, float, float]], alpha: float, gate: float
) -> None:
    columns: Any = [list(column) for column in zip(*rows, strict=True)]
    x, weight, upstream = (torch.tensor(column, dtype=torch.float64) for column in columns)
    x.requires_grad_()
    weight.requires_grad_()
    y = ops.seed_forward(x, lambda inner: weight * inner * inner, scalar(alpha), scalar(gate))
    y.backward(upstream)
    expected = reference(columns[0], columns[1], alpha, gate, columns[2])
    for actual, wanted in zip((y, x.grad, weight.grad), expected, strict=True):
        assert actual is not None
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual.detach(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@given(alpha=st.floats(-2, 2, width=32), gate=st.floats(0, 1, width=32))
def test_the_seed_is_the_formula_written_with_detach(alpha: float, gate: float) -> None:
    """y = x + alpha * body(gate * x + (1 - gate) * stop_gradient(x)), computed by autograd in another way."""

    def body(inner: Tensor) -> Tensor:
        return torch.tanh(inner @ torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3))

    x = torch.linspace(-1, 2, 6, dtype=torch.float64).reshape(2, 3).requires_grad_()
    other = x.detach().clone().requires_grad_()
    actual = ops.seed_forward(x, body, scalar(alpha), scalar(gate))
    expected = other + alpha * body(gate * other + (1 - gate) * other.detach())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    actual.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_alpha_and_gate_do_not_take_part_in_type_promotion(dtype: torch.dtype) -> None:
    x = torch.ones(3, dtype=dtype, requires_grad=True)
    y = ops.seed_forward(x, torch.sin, scalar(0.5), scalar(0.5))
    y.sum().backward()
    assert y.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_no_gradient_flows_into_alpha_and_gate() -> None:
    x = torch.ones(3, requires_grad=True)
    gate = torch.tensor(0.5, requires_grad=True)
    ops.seed_input(x, scalar(1.0), gate).sum().backward()
    assert gate.grad is None


def test_the_operator_asks_its_model_to_run_the_seed() -> None:
    class Host:
        def run_seed(self, site: int, x: Tensor, alpha: Tensor, gate: Tensor, source: Tensor | None) -> Tensor:
            return x * alpha[site] + gate[site]

    host = Host()
    ops.hosts[-5] = host  # type: ignore[assignment]
    x = torch.ones(2, requires_grad=True)
    y = torch.ops.esper.seed(x, torch.tensor([1.0, 3.0]), torch.tensor([0.0, 4.0]), -5, 1, True)
    y.sum().backward()
    assert y.tolist() == [7.0, 7.0]
    assert x.grad is not None
    assert x.grad.tolist() == [3.0, 3.0]
    del host
    with pytest.raises(RuntimeError, match="esper::seed was called for model -5, which no longer exists"):
        torch.ops.esper.seed(x, x, x, -5, 1, True)


def test_without_data_the_operator_is_shaped_like_its_input() -> None:
    x = torch.empty(2, 3, device="meta", dtype=torch.float64, requires_grad=True)
    y = torch.ops.esper.seed(x, x, x, 0, 0, False)
    assert (y.shape, y.dtype, y.device, y.requires_grad) == (x.shape, x.dtype, x.device, True)


def test_what_the_operator_returns_while_it_is_traced_may_be_changed_in_place() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, requires_grad=True)
        y = torch.ops.esper.seed(x, x, x, 0, 0, False)
        assert y.relu_().requires_grad


def test_the_digest_follows_the_source_and_the_functions_are_named() -> None:
    assert len(ops.source_digest()) == 64
    assert ops.source_digest() == ops.source_digest()
    functions = (ops.seed_input, ops.seed_output, probe.site_values, probe.site_gradient, probe.site_sensor)
    assert tuple(qualified_name(function) for function in functions) == ops.GRAPH_FUNCTIONS
