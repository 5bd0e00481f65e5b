"""esper::low_rank_rows and its backward pass: what esper::low_rank is made of where rows of x are kept on the chip.

Not for use by themselves. They are operators because their kernel is written in Gluon: Inductor can put kernels in Triton's own
language among its own, but not those, so a compiled region calls these operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("esper", "FRAGMENT")
_library.define(
    "low_rank_rows(Tensor x, Tensor down, Tensor up, Tensor alpha, str activation, int dim, int config, bool save) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "low_rank_rows_backward(Tensor grad, Tensor hidden, Tensor down, Tensor up, Tensor alpha, Tensor gate, str activation, "
    "int dim, int config) -> (Tensor, Tensor, Tensor)"
)


def _forward(
    x: Tensor, down: Tensor, up: Tensor, alpha: Tensor, activation: str, dim: int, config: int, save: bool
) -> tuple[Tensor, Tensor]:
    from esper_fx.kernels import low_rank_rows as kernels

    x, down, up = _aligned(x), _aligned(down.t()).t(), _aligned(up.t()).t()
    kernels.check(x, down, up, dim, config)
    return kernels.forward(x, down, up, alpha, activation, config, save)


def _backward(
    grad: Tensor,
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    alpha: Tensor,
    gate: Tensor,
    activation: str,
    dim: int,
    config: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from esper_fx.kernels import low_rank_rows as kernels

    grad, hidden, down, up = _aligned(grad), _aligned(hidden), _aligned(down.t()).t(), _aligned(up.t()).t()
    kernels.check(grad, down, up, dim, config)
    return kernels.backward(grad, hidden, down, up, alpha, gate, activation, config)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where the kernel could not copy 16 bytes at a time."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


_library.impl("low_rank_rows", _forward, "CUDA")
_library.impl("low_rank_rows_backward", _backward, "CUDA")


@torch.library.register_fake("esper::low_rank_rows", lib=_library)
def _forward_fake(
    x: Tensor, down: Tensor, up: Tensor, alpha: Tensor, activation: str, dim: int, config: int, save: bool
) -> tuple[Tensor, Tensor]:
    from esper_fx.kernels import low_rank_rows as kernels

    kernels.check(x, down, up, dim, config)
    rows = x.numel() // x.shape[-1] if save else 0
    return torch.empty_like(x), x.new_empty((rows, down.shape[1]))


@torch.library.register_fake("esper::low_rank_rows_backward", lib=_library)
def _backward_fake(
    grad: Tensor,
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    alpha: Tensor,
    gate: Tensor,
    activation: str,
    dim: int,
    config: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from esper_fx.kernels import low_rank_rows as kernels

    grad = grad.new_empty(grad.shape)
    kernels.check(grad, down, up, dim, config)
    parts = -(-hidden.shape[0] // kernels.CONFIGS[config].block_m)
    return grad, torch.empty_like(hidden), alpha.new_empty(parts)
