"""esper::site_stats: what there is to say about the value at a site, in one read of it.

No gradient flows through it, so that it may look at anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esper_fx._torch import triton_op
from esper_fx.kernels.launch import runs_kernels

#: What the result holds, in this order.
FIELDS = ("count", "mean", "m2", "absmax", "nonfinite")


@triton_op("esper::site_stats")
def site_stats(x: Tensor, config: int = 0) -> Tensor:
    """Statistics of all elements of ``x``.

    Args:
        x: Any shape and strides, floating. The kernel takes up to 32 bits; float64 goes through the reference.
        config: Number of the tile configuration; see ``esper_fx.kernels.site_stats.CONFIGS``.

    Returns:
        Float64 ``[5]``: number of finite values; their mean; their M2, the sum of squared deviations from the mean; their
        largest absolute value; number of values that are NaN or infinite. Without finite values the middle three are 0.
    """
    if runs_kernels(x) and x.dtype != torch.float64:
        from esper_fx.kernels import site_stats as kernels

        return kernels.forward(x, config)
    return reference(x)


def reference(x: Tensor) -> Tensor:
    """:func:`site_stats` in ATen and float64."""
    if x.numel() == 0:
        return x.new_zeros(len(FIELDS), dtype=torch.float64)
    finite = torch.isfinite(x)
    values = torch.where(finite, x, 0).double()
    count = finite.sum()
    mean = values.sum() / count.clamp(min=1)
    squares = torch.where(finite, values - mean, 0).square().sum()
    return torch.stack([count.double(), mean, squares, values.abs().amax(), (x.numel() - count).double()])


@site_stats.register_fake
def _site_stats_fake(x: Tensor, config: int = 0) -> Tensor:
    return x.new_empty(len(FIELDS), dtype=torch.float64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _backward(ctx: Any, _: Any) -> tuple[None, None]:
    return None, None


site_stats.register_autograd(_backward, setup_context=_setup_context)
