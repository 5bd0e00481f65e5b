"""What a seed computes whose body reads the source of its value: the same selection, and the gate on the source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from esper_fx import ops

finite = st.floats(-3, 3, allow_nan=False)
BAD: dict[str, Callable[[Tensor], Tensor]] = {
    "inf": lambda s: s.sum(1, keepdim=True) / 0.0,
    "nan": lambda s: s.sum(1, keepdim=True) * float("nan"),
    "nan gradient": lambda s: (s - s).sqrt().sum(1, keepdim=True),
    "overflow": lambda s: (s.sum(1, keepdim=True) * 1e30) * 1e30,
}


class Reads(nn.Module):
    """A body that reads the source."""

    reads_source = True

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, source: Tensor) -> Tensor:
        return self.function(source)


def scalar(value: float) -> Tensor:
    return torch.tensor(value)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("gate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_at_alpha_zero_the_seed_is_the_identity_and_the_source_gets_no_gradient(
    name: str, gate: float, dtype: torch.dtype
) -> None:
    x = torch.tensor([[-1.5], [2.0]], dtype=dtype, requires_grad=True)
    source = torch.tensor([[-1.5, 0.0, 2.0], [1.0, 1.0, 1.0]], dtype=dtype, requires_grad=True)
    upstream = torch.tensor([[3.0], [-7.0]], dtype=dtype)
    y = ops.seed_forward(x, Reads(BAD[name]), scalar(0.0), scalar(gate), source)
    y.backward(upstream)
    assert torch.equal(y, x)
    assert y.dtype == dtype
    assert torch.equal(x.grad, upstream)  # type: ignore[arg-type]
    assert torch.equal(source.grad, torch.zeros_like(source))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BAD)
def test_the_bad_bodies_are_bad(name: str) -> None:
    source = torch.ones(2, 3, requires_grad=True)
    value = BAD[name](source)
    value.sum().backward()
    assert source.grad is not None
    assert not (source.grad.isfinite().all() and value.isfinite().all())


@pytest.mark.parametrize("function", [BAD["nan gradient"], lambda s: s.sin().sum(1, keepdim=True)])
def test_at_gate_zero_nothing_flows_back_into_the_source_but_the_body_learns(
    function: Callable[[Tensor], Tensor],
) -> None:
    x, source = torch.randn(2, 1, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    weight = torch.tensor(0.5, requires_grad=True)
    y = ops.seed_forward(x, Reads(lambda s: function(s) * weight), scalar(2.0), scalar(0.0), source)
    y.sum().backward()
    assert torch.equal(y, x + 2.0 * (function(source) * weight))
    assert torch.equal(x.grad, torch.ones(2, 1))  # type: ignore[arg-type]
    assert torch.equal(source.grad, torch.zeros(2, 3))  # type: ignore[arg-type]
    torch.testing.assert_close(weight.grad, 2.0 * function(source.detach()).sum())


@given(
    rows=st.lists(st.tuples(finite, finite, finite, finite), min_size=1, max_size=4),
    alpha=st.one_of(st.just(0.0), st.floats(-2, 2, width=32)),
    gate=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32)),
)
def test_values_and_gradients_are_the_formulas(
    rows: list[tuple[float, float, float, float]], alpha: float, gate: float
) -> None:
    """y = x + alpha * weight * s², by hand: s̃ has the value s and the derivative gate.

    dy/dx = 1, dy/ds = alpha * weight * 2s * gate, dy/dweight = alpha * s².
    """
    columns: Any = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    x, source, weight, upstream = columns
    for leaf in (x, source, weight):
        leaf.requires_grad_()
    y = ops.seed_forward(x, Reads(lambda s: weight * s * s), scalar(alpha), scalar(gate), source)
    y.backward(upstream)
    with torch.no_grad():
        expected = (
            x + alpha * weight * source**2,
            upstream,
            upstream * alpha * weight * 2 * source * gate,
            upstream * alpha * source**2,
        )
    for actual, wanted in zip((y.detach(), x.grad, source.grad, weight.grad), expected, strict=True):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


@given(alpha=st.floats(-2, 2, width=32), gate=st.floats(0, 1, width=32))
def test_a_linear_map_with_lora_is_the_formula_written_with_detach(alpha: float, gate: float) -> None:
    """y = W s + alpha * B tanh(A s̃), s̃ = gate * s + (1 - gate) * stop_gradient(s), where the value comes from the source."""
    weight, down, up = (
        torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(shape) for shape in ((4, 3), (4, 3), (4, 3))
    )
    source = torch.linspace(-1, 2, 6, dtype=torch.float64).reshape(2, 3).requires_grad_()
    other = source.detach().clone().requires_grad_()

    def lora(inner: Tensor) -> Tensor:
        return torch.tanh(inner @ down.T) @ up @ down.T

    actual = ops.seed_forward(source @ weight.T, Reads(lora), scalar(alpha), scalar(gate), source)
    expected = other @ weight.T + alpha * lora(gate * other + (1 - gate) * other.detach())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    actual.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(source.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_other_bodies_do_not_notice_the_source() -> None:
    x, source = torch.randn(2, 3, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    y = ops.seed_forward(x, torch.sin, scalar(0.5), scalar(1.0), source)
    y.sum().backward()
    assert torch.equal(y, x + 0.5 * x.sin())
    assert source.grad is None


def test_a_body_that_reads_a_source_that_is_not_there_is_refused() -> None:
    with pytest.raises(RuntimeError, match="Reads reads the input of the module at its site, but none was handed over"):
        ops.seed_forward(torch.ones(2), Reads(torch.sin), scalar(1.0), scalar(1.0))


def test_the_operator_hands_the_source_on() -> None:
    class Host:
        def run_seed(self, site: int, x: Tensor, alpha: Tensor, gate: Tensor, source: Tensor | None) -> Tensor:
            assert source is not None
            return x + source.sum() * alpha[site]

    host = Host()
    ops.hosts[-6] = host
    x, source = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    y = torch.ops.esper.seed(x, torch.tensor([1.0, 3.0]), torch.zeros(2), -6, 1, True, source)
    y.sum().backward()
    assert y.tolist() == [10.0, 10.0]
    assert source.grad.tolist() == [6.0] * 3  # type: ignore[union-attr]
    meta = torch.empty(2, 3, device="meta")
    assert torch.ops.esper.seed(meta, meta, meta, -6, 0, True, torch.empty(5, device="meta")).shape == (2, 3)
