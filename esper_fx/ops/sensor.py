"""esper::sensor: (x Omega)ᵀ g, what the gradient of a linear map at a site looks like through k random directions.

A linear map W with y = x W receives the gradient xᵀ g. This is Omegaᵀ times it, with Omega ``[d, k]`` of independent entries
+-1 / sqrt(k), so that Omega Omegaᵀ is the identity on average: its singular values and right singular vectors stand for those
of xᵀ g. An entry's sign is a hash of the seed and of its place; Omega is never stored, and the same seed gives the same one
everywhere. No gradient flows through it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esper_fx._torch import triton_op
from esper_fx.kernels.launch import runs_kernels

#: As many directions as the kernels take; beyond, the operator is its ATen reference.
MAX_DIRECTIONS = 64

_MASK = 0xFFFFFFFF


@triton_op("esper::sensor")
def sensor(x: Tensor, g: Tensor, seed: int, k: int, dim: int = -1, config: int = 0) -> Tensor:
    """Sketch the gradient that a linear map at a site would receive.

    Args:
        x: Value at the site, any shape, floating.
        g: Gradient of the site's value, of the same shape; strides and dtype may differ.
        seed: Chooses Omega; its lower 32 bits count.
        k: Number of directions.
        dim: The dimension that holds features, of size ``d``; everything else counts as rows.
        config: Number of the tile configuration; see ``esper_fx.kernels.sensor.CONFIGS``.

    Returns:
        Float32 ``[k, d]``. Float64 ``x`` goes through the reference, as more directions than ``MAX_DIRECTIONS`` do.
    """
    if runs_kernels(x) and k <= MAX_DIRECTIONS and torch.float64 not in (x.dtype, g.dtype):
        from esper_fx.kernels import sensor as kernels

        return kernels.forward(x, g, key_of(seed), k, dim, config)
    features = x.shape[dim]
    dtype = torch.promote_types(torch.promote_types(x.dtype, g.dtype), torch.float32)
    rows, gradients = (t.movedim(dim, -1).reshape(-1, features).to(dtype) for t in (x, g))
    return ((rows @ omega(seed, features, k, x.device).to(dtype)).t() @ gradients).float()


def key_of(seed: int) -> int:
    """What places are hashed with, for a seed: an int32, so that kernels have it as one whatever it is."""
    key = _hashed(seed & _MASK)
    return key - (1 << 32) if key >> 31 else key


def omega(seed: int, features: int, k: int, device: torch.device | None = None) -> Tensor:
    """Omega, float64 ``[features, k]``, as the kernels make it in registers: by 32-bit arithmetic, here within 64 bits."""
    places = torch.arange(features * k, device=device).view(features, k)
    bits = _hashed((places ^ key_of(seed)) & _MASK)
    return (1.0 - 2.0 * (bits >> 31).double()) / k**0.5


def _hashed(x: Any) -> Any:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


@sensor.register_fake
def _sensor_fake(x: Tensor, g: Tensor, seed: int, k: int, dim: int = -1, config: int = 0) -> Tensor:
    return x.new_empty((k, x.shape[dim]), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _backward(ctx: Any, _: Any) -> tuple[None, ...]:
    return (None,) * 6


sensor.register_autograd(_backward, setup_context=_setup_context)
