"""esper::channel_gate: y = x + alpha * x̃ * tanh(s / 2), a gate on every channel of a map as one operator.

s = up(relu(down(mean of x̃ over positions))), two linear layers (Hu et al. 2018, equations 2 to 4). x̃ is x to the forward pass;
to the backward pass the gradient through the body into x is multiplied by the gate. Where alpha is 0, y is x and the gradients
of the layers and of alpha are 0, whatever the layers hold.

The layers see one row for every sample, so that they cost next to nothing, and are ATen on every device; what goes over the
map is a Triton kernel where there is a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from esper_fx._torch import triton_op
from esper_fx.kernels.launch import runs_kernels
from esper_fx.kernels.rows import rows_of


@triton_op("esper::channel_gate")
def channel_gate(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    alpha: Tensor,
    gate: Tensor,
    config: int = 0,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gate the channels of a map, as a residual.

    Args:
        x: Map ``[N, C, *]`` with at least one dimension of positions, floating.
        down_weight: Of the first layer, ``[H, C]``; both layers compute in its dtype.
        down_bias: ``[H]``, of the same dtype.
        up_weight: Of the second layer, ``[C, H]``, of the same dtype.
        up_bias: ``[C]``, of the same dtype.
        alpha: Factor on the residual, 0-dim float32.
        gate: Factor on the gradient that flows into ``x`` through the residual, 0-dim float32.
        config: Number of the tile configuration; see ``esper_fx.kernels.channel_gate.CONFIGS``.
        save: Keep what the backward pass needs.

    Returns:
        y like ``x``. For the backward pass, empty unless ``save``: the means ``[N, C]``, the hidden values before the
        activation ``[N, H]``, and tanh(s / 2) ``[N, C]``; the first and last float32, or float64 as ``x`` is.
    """
    x = rows_of(x, 1).tensor
    if runs_kernels(x):
        from esper_fx.kernels import channel_gate as kernels

        pooled = kernels.pool(x, alpha, config)
        hidden, gates = _layers(pooled, down_weight, down_bias, up_weight, up_bias)
        y = kernels.scale(x, alpha * gates, None, alpha, x, config)
    else:
        pooled = x.flatten(2).mean(2, dtype=_sum_dtype(x))
        hidden, gates = _layers(pooled, down_weight, down_bias, up_weight, up_bias)
        y = _laid_out_like(x, torch.where(alpha == 0, x, x + x * _at_positions(alpha * gates, x)))
    if save:
        return y, pooled, hidden, gates
    return (
        y,
        pooled.new_empty((0, x.shape[1])),
        hidden.new_empty((0, hidden.shape[1])),
        gates.new_empty((0, x.shape[1])),
    )


@triton_op("esper::channel_gate_backward")
def channel_gate_backward(
    grad: Tensor,
    x: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gates: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    alpha: Tensor,
    gate: Tensor,
    config: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, the layers' weights and biases, and ``alpha`` of :func:`channel_gate`.

    Args:
        grad: Gradient of y, shaped like ``x``.
        pooled: What :func:`channel_gate` kept; ``hidden`` and ``gates`` too.

    The other arguments are those of :func:`channel_gate`.
    """
    x, grad = rows_of(x, 1).tensor, rows_of(grad, 1).tensor
    fused = runs_kernels(x)
    if fused:
        from esper_fx.kernels import channel_gate as kernels

        dots = kernels.dots(grad, x, alpha, config)
    else:
        dots = (grad.to(_sum_dtype(x)) * x).flatten(2).sum(2)
    silent, dtype = alpha == 0, down_weight.dtype
    dlogits = (alpha * dots * (0.5 * (1 - gates * gates))).to(dtype)
    dhidden = torch.where(hidden > 0, (dlogits @ up_weight).to(dtype), 0.0)
    dpooled = (dhidden @ down_weight).to(gates.dtype)
    parameters = (
        dhidden.t() @ pooled.to(dtype),
        dhidden.sum(0),
        dlogits.t() @ functional.relu(hidden),
        dlogits.sum(0),
    )
    dalpha = torch.where(silent, 0.0, (dots * gates).sum()).to(alpha.dtype)
    # What the gate multiplies: all that comes back through the body, but not the direct gradient.
    passed = torch.where(silent, 0.0, gate)
    factor, offset = passed * (alpha * gates), passed * (dpooled / max(1, rows_of(x, 1).positions))
    if fused:
        dx = kernels.scale(grad, factor, offset, passed, x, config)
    else:
        through = grad * _at_positions(factor, x) + _at_positions(offset, x)
        dx = _laid_out_like(x, torch.where(passed == 0, grad, grad + through))
    zero = torch.zeros((), dtype=dtype, device=x.device)
    ddown_weight, ddown_bias, dup_weight, dup_bias = (
        torch.where(silent, zero, gradient.to(dtype)) for gradient in parameters
    )
    return dx, ddown_weight, ddown_bias, dup_weight, dup_bias, dalpha


@channel_gate.register_fake
def _channel_gate_fake(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    alpha: Tensor,
    gate: Tensor,
    config: int = 0,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    samples = x.shape[0] if save else 0
    means = x.new_empty((samples, x.shape[1]), dtype=_sum_dtype(x))
    hidden = down_weight.new_empty((samples, down_weight.shape[0]))
    return torch.empty_like(rows_of(x, 1).tensor), means, hidden, torch.empty_like(means)


@channel_gate_backward.register_fake
def _channel_gate_backward_fake(
    grad: Tensor,
    x: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gates: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    alpha: Tensor,
    gate: Tensor,
    config: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(rows_of(x, 1).tensor),
        down_weight.new_empty(down_weight.shape),
        down_weight.new_empty(down_weight.shape[:1]),
        up_weight.new_empty(up_weight.shape),
        up_weight.new_empty(up_weight.shape[:1]),
        torch.empty_like(alpha),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, down_weight, _, up_weight, _, alpha, gate, ctx.config, save = inputs
    if not save:
        raise RuntimeError(
            "esper::channel_gate was called with save=False, but a gradient is asked for; pass save=True"
        )
    ctx.save_for_backward(x, *output[1:], down_weight, up_weight, alpha, gate)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return (*channel_gate_backward(grad, *ctx.saved_tensors, ctx.config), None, None, None)


channel_gate.register_autograd(_backward, setup_context=_setup_context)


def _layers(
    pooled: Tensor, down_weight: Tensor, down_bias: Tensor, up_weight: Tensor, up_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Hidden values before the activation, in the layers' dtype, and tanh(s / 2) in that of ``pooled``."""
    hidden = functional.linear(pooled.to(down_weight.dtype), down_weight, down_bias).to(down_weight.dtype)
    logits = functional.linear(functional.relu(hidden), up_weight, up_bias)
    return hidden, torch.tanh(logits.to(pooled.dtype) * 0.5)


def _sum_dtype(x: Tensor) -> torch.dtype:
    """What sums over positions are taken in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _at_positions(values: Tensor, x: Tensor) -> Tensor:
    """``[N, C]`` as ``[N, C, 1, ...]``, with the dimensions of ``x``."""
    return values.reshape(values.shape + (1,) * (x.ndim - 2))


def _laid_out_like(x: Tensor, value: Tensor) -> Tensor:
    """A new tensor with the values of ``value``, and dtype and strides as ``torch.empty_like(x)`` has them."""
    return torch.empty_like(x).copy_(value)
