"""What the tests of operators on maps share: what is right, maps in many memory formats, and how near is near enough."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from esper_fx import ops
from esper_fx.blueprints.channel_gate import ChannelGate
from tests.support.kernels import TOLERANCE, distance

#: Of float64 too, which is computed by the reference only.
TOLERANCES = {**TOLERANCE, torch.float64: 1e-12}

alphas = st.sampled_from([0.0, -0.0, 1.0, -0.75, 0.3])
gates = st.sampled_from([0.0, 1.0, 0.3])


def _channels_innermost(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _sliced(x: Tensor) -> Tensor:
    return nn.functional.pad(x, (2, 1))[..., 2:-1]


def _every_other_channel(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 1)[:, ::2]


def _last_outermost(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


#: Ways for a map to lie in memory: each returns an equal one.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "channels innermost": _channels_innermost,
    "slice": _sliced,
    "every other channel": _every_other_channel,
    "last dimension outermost": _last_outermost,
}
layouts = st.sampled_from(sorted(LAYOUTS))

#: And for gradients, which also come as one number for all elements, such as that of a sum.
GRADIENT_LAYOUTS = LAYOUTS | {"expanded": lambda x: x[(slice(1),) * x.ndim].expand_as(x)}
gradient_layouts = st.sampled_from(sorted(GRADIENT_LAYOUTS))


def scalar(value: float, *, requires_grad: bool = False) -> Tensor:
    """alpha or gate as operators take them."""
    return torch.tensor(value, requires_grad=requires_grad)


def gateable_map(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A map, or its gradient, for a ``channel_gate_body``: positive in half precision."""
    values = torch.randn(shape)
    return (values.abs() + 0.1 if dtype.itemsize == 2 else values).to(dtype)


def channel_gate_body(shape: tuple[int, ...], hidden: int, dtype: torch.dtype) -> ChannelGate:
    """A channel gate for maps of this shape, with nothing zero in it and hidden values on both sides of 0.

    In half precision its layers pass on rounded values, and with random signs these cancel out and leave the rounding: there
    all that goes into a sum is positive, but for the biases of hidden values that are far below 0.
    """
    body = ChannelGate(shape[1], hidden, len(shape) - 2)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.normal_()
        if dtype.itemsize == 2:
            for layer in (body.down, body.up):
                layer.weight.uniform_(0.5, 1.5).div_(layer.in_features)
                layer.bias.uniform_(0.0, 0.5)
            body.down.bias[1::2] -= 8
    return body.to(dtype)


def convolution_body(channels: int, kernel_size: tuple[int, ...], dtype: torch.dtype) -> nn.Module:
    """A depthwise convolution as the blueprint builds it, but with nothing zero in it."""
    layer = nn.Conv1d if len(kernel_size) == 1 else nn.Conv2d
    body: nn.Module = layer(channels, channels, kernel_size, padding="same", groups=channels)
    for parameter in body.parameters():
        nn.init.normal_(parameter)
    return body.to(dtype)


def assert_seed(
    y: Tensor,
    gradients: Sequence[Tensor],
    x: Tensor,
    body: nn.Module,
    alpha: float,
    gate: float,
    grad: Tensor,
    tolerance: float,
) -> None:
    """Assert that an operator computed what a seed with this body does, eagerly and in float64.

    Args:
        y: What the operator returned.
        gradients: What it gave back for ``grad``: of ``x``, of the body's parameters in their order, and of alpha.
        x: The value at the site.
        body: The blueprint's module, with the operator's parameters.
        alpha: Factor on the residual.
        gate: Factor on what flows back through it.
        grad: Gradient of y.
        tolerance: Norm of the difference relative to that of what is right; for alpha relative to what is summed, because
            it may cancel out.
    """
    body, grad = copy.deepcopy(body).double().cpu(), grad.double().cpu()
    value, factor = x.detach().double().cpu().requires_grad_(), scalar(alpha, requires_grad=True)
    expected = ops.seed_forward(value, body, factor, scalar(gate))
    expected_gradients = torch.autograd.grad(expected, [value, *body.parameters(), factor], grad)
    names = ["y", *(f"gradient of {name}" for name in ("x", *dict(body.named_parameters()), "alpha"))]
    summed = (grad * body(value)).abs().sum().detach()
    right = [expected.detach(), *expected_gradients]
    for name, got, wanted in zip(names, [y, *gradients], right, strict=True):
        assert got.shape == wanted.shape, f"{name}: {got.shape}, expected {wanted.shape}"
        off, allowed = distance(got.cpu(), wanted), tolerance
        if name == "gradient of alpha":  # float32 whatever the others are
            off, allowed = float((got.double().cpu() - wanted).abs() / summed.clamp_min(1e-30)), max(tolerance, 1e-6)
        assert off <= allowed, f"{name}: off by {off:.2e}, expected {allowed:.0e} at most"


def assert_operator(operator: Any, arguments: tuple[Any, ...], *, differentiable: bool, traceable: bool) -> None:
    """Assert that schema and fake tell the truth about an operator, strides too.

    Args:
        operator: The operator.
        arguments: What to call it with, without gradients.
        differentiable: Also that gradients are registered as they should be.
        traceable: Also that it is the same when it is traced, with dynamic shapes too; takes seconds.
    """
    tests = ("test_schema", "test_faketensor")
    if traceable:
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, arguments, test_utils=tests)
    if differentiable:
        tensors = (x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in arguments)
        torch.library.opcheck(operator, tuple(tensors), test_utils=tests)


def far_apart(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A map of one sample, float16, whose third channel lies more than 2**31 elements behind the first: in a sparse file."""
    apart = 2**30 + 8
    places = torch.from_file(str(path), shared=True, size=2 * apart + math.prod(shape[2:]), dtype=torch.float16)
    inner = torch.empty(shape[2:]).stride()
    return places.as_strided(shape, (1, apart, *inner)).copy_(torch.randn(shape))
