"""What is measured at a site while a region runs, and what is measured of the gradient there on the way back.

Shapes: a region with n sites gives back its sites' values as float64 ``[n, len(VALUES)]``, and takes one leaf, float64
``[n, len(GRADIENTS)]``, whose ``.grad`` after the backward pass holds what that has measured. A site with a sensor has one more
leaf, float32 ``[k, d]``, for the sketch. Nothing that is measured changes what the region computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esper_fx.ops.sensor import sensor
from esper_fx.ops.site_stats import FIELDS, site_stats

#: Of the value x before a seed and y after it: what `site_stats` says of x, and the sum of squares of y - x.
VALUES = (*FIELDS, "change")

#: Of the gradient g of y: the sum of its squares, its largest absolute value, the sums of g x and of g (y - x).
GRADIENTS = ("squares", "absmax", "value", "change")


def site_values(x: Tensor, y: Tensor) -> Tensor:
    """What is measured of the value at a site; float64 ``[len(VALUES)]``, without a gradient.

    Args:
        x: The value before the seed, any shape, floating.
        y: The value after it; ``x`` itself where the seed is the identity.
    """
    x, same = x.detach(), y is x
    change = torch.zeros((), dtype=torch.float64, device=x.device) if same else _change(x, y.detach()).square().sum()
    return torch.cat([site_stats(x), change.reshape(1)])


def site_gradient(y: Tensor, x: Tensor, leaf: Tensor, row: int) -> Tensor:
    """Return ``y``; a backward pass puts what it measures of the gradient there into a row of the leaf's gradient.

    Args:
        y: The value after the seed.
        x: The value before it.
        leaf: Float64 ``[n, len(GRADIENTS)]``. Where it requires no gradient, or ``y`` does not, or gradients are off, nothing
            is measured.
        row: Which row of it is this site's.
    """
    if not (leaf.requires_grad and y.requires_grad and torch.is_grad_enabled()):
        return y
    result: Tensor = _Measure.apply(y, x.detach(), leaf.select(0, row))  # type: ignore[no-untyped-call]
    return result


def site_sensor(y: Tensor, x: Tensor, leaf: Tensor, dim: int) -> Tensor:
    """Return ``y``; a backward pass puts a sketch of the gradient that a linear map from x to y would get into the leaf's.

    Args:
        y: The value after the seed.
        x: The value before it.
        leaf: Float32 ``[k, d]``; see :func:`esper_fx.ops.sensor.sensor`, whose result its gradient is. Where it requires no
            gradient, or ``y`` does not, or gradients are off, nothing is measured.
        dim: The dimension of size d that holds features.
    """
    if not (leaf.requires_grad and y.requires_grad and torch.is_grad_enabled()):
        return y
    result: Tensor = _Sense.apply(y, x.detach(), leaf, dim)  # type: ignore[no-untyped-call]
    return result


def same(y: Tensor) -> Tensor:
    """Another tensor with the memory of ``y`` and its strides, which `view_as` changes where a dimension is of size 1."""
    alias: Tensor = torch.ops.aten.alias(y)
    return alias


class _Sense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, leaf: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.directions, ctx.dim = leaf.shape[0], dim
        return same(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        return gradient, None, sketch(x, gradient.detach(), ctx.directions, ctx.dim), None


def sketch(x: Tensor, g: Tensor, directions: int, dim: int) -> Tensor:
    """The sketch that all sensors make: of one Omega, so that equal regions are equal, and sketches of several steps add up."""
    result: Tensor = sensor(x, g, 0, directions, dim)
    return result


class _Measure(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return same(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        (gradient,) = gradients
        return gradient, None, gradient_row(gradient.detach(), *ctx.saved_tensors)


def gradient_row(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """What is measured of the gradient at a site; float64 ``[len(GRADIENTS)]``.

    Args:
        g: Gradient of ``y``, any shape, floating.
        x: The value before the seed, of the same shape.
        y: The value after it.
    """
    g = g.double()
    if g.numel() == 0:
        return g.new_zeros(len(GRADIENTS))
    return torch.stack([g.square().sum(), g.abs().amax(), (g * x).sum(), (g * _change(x, y)).sum()])


def _change(x: Tensor, y: Tensor) -> Tensor:
    """y - x in float64, 0 where that is not finite."""
    change = y.double() - x.double()
    return torch.where(torch.isfinite(change), change, 0.0)
