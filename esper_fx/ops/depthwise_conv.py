"""esper::depthwise_conv: y = x + alpha * (conv(x̃) + bias), a filter on every channel of a map as one operator.

x̃ is x to the forward pass; to the backward pass the gradient through the body into x is multiplied by the gate. Where alpha
is 0, y is x and the gradients of the filters, the bias and alpha are 0, whatever the filters hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn import grad as grad_functions

from esper_fx._torch import triton_op
from esper_fx.kernels.launch import runs_kernels
from esper_fx.kernels.rows import rows_of


@triton_op("esper::depthwise_conv")
def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, gate: Tensor, config: int = 0) -> Tensor:
    """Add what a depthwise convolution makes of a map to the map.

    Args:
        x: ``[N, C, L]`` or ``[N, C, H, W]``, floating.
        weight: The filters, ``[C, 1, K]`` or ``[C, 1, K, K']``, of odd sizes; the map is padded with zeros and keeps its size.
        bias: ``[C]``, of the same dtype.
        alpha: Factor on the residual, 0-dim float32.
        gate: Factor on the gradient that flows into ``x`` through the residual, 0-dim float32.
        config: Number of the tile configuration; see ``esper_fx.kernels.depthwise_conv.CONFIGS``.

    Returns:
        y like ``x``.
    """
    x = rows_of(x, 1).tensor
    if runs_kernels(x):
        from esper_fx.kernels import depthwise_conv as kernels

        return kernels.forward(x, weight, bias, alpha, config)
    return _add(x, _convolution(x, weight, bias), alpha, x)


@triton_op("esper::depthwise_conv_backward")
def depthwise_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, gate: Tensor, config: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weight``, ``bias`` and ``alpha`` of :func:`depthwise_conv`.

    Args:
        grad: Gradient of y, shaped like ``x``.

    The other arguments are those of :func:`depthwise_conv`.
    """
    x, grad = rows_of(x, 1).tensor, rows_of(grad, 1).tensor
    silent, dtype = alpha == 0, weight.dtype
    if runs_kernels(x):
        from esper_fx.kernels import depthwise_conv as kernels

        dx, dweight, dbias = kernels.backward(grad, x, weight, alpha, gate, config)
    else:
        positions = tuple(range(2, x.ndim))
        through = alpha * _convolution(grad, weight.flip(positions), None)
        dx = _add(grad, through, torch.where(silent, 0.0, gate), x)
        dweight = _filter_gradient(x.to(dtype), grad.to(dtype), weight)
        dbias = grad.to(dtype).sum((0, *positions))
    # y is linear in the filters and the bias, so that what they get says what alpha gets.
    of_weight = (dweight * weight).to(alpha.dtype).sum()
    of_bias = (dbias * bias).to(alpha.dtype).sum()
    dalpha = torch.where(silent, 0.0, of_weight + of_bias)
    zero = torch.zeros((), dtype=dtype, device=x.device)
    dweight, dbias = (torch.where(silent, zero, (alpha * value).to(dtype)) for value in (dweight, dbias))
    return dx, dweight, dbias, dalpha


@depthwise_conv.register_fake
def _depthwise_conv_fake(
    x: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, gate: Tensor, config: int = 0
) -> Tensor:
    return torch.empty_like(rows_of(x, 1).tensor)


@depthwise_conv_backward.register_fake
def _depthwise_conv_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, gate: Tensor, config: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dweight, dbias = weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])
    return torch.empty_like(rows_of(x, 1).tensor), dweight, dbias, torch.empty_like(alpha)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.config = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*depthwise_conv_backward(grad, *ctx.saved_tensors, ctx.config), None, None)


depthwise_conv.register_autograd(_backward, setup_context=_setup_context)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the dtype of ``weight``, one filter a channel, padded so that the map keeps its size."""
    convolve = functional.conv1d if x.ndim == 3 else functional.conv2d
    return convolve(x.to(weight.dtype), weight, bias, padding=_padding(weight), groups=weight.shape[0])


def _filter_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Of the sum of ``grad`` times the convolution of ``x``, laid out contiguously."""
    gradient_of: Any = grad_functions.conv1d_weight if x.ndim == 3 else grad_functions.conv2d_weight
    gradient: Tensor = gradient_of(x, list(weight.shape), grad, padding=_padding(weight), groups=weight.shape[0])
    return gradient.to(weight.dtype).contiguous()


def _padding(weight: Tensor) -> tuple[int, ...]:
    return tuple(size // 2 for size in weight.shape[2:])


def _add(x: Tensor, delta: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    """``x + factor * delta``, and ``x`` where ``factor`` is 0, with the dtype and strides of ``torch.empty_like(like)``."""
    return torch.empty_like(like).copy_(torch.where(factor == 0, x, x + factor * delta))
