"""Inputs of kernels, and how near their results must be to float64."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Norm of the difference from float64, relative to the norm of what is right.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
alphas = st.sampled_from([1.0, 0.5, -2.0, 0.0])
gates = st.sampled_from([1.0, 0.25, 0.0])
memory_formats = st.sampled_from(["contiguous", "channels last", "transposed", "every second"])


def scalar(value: float) -> Tensor:
    """A 0-dim float32 tensor, as alpha and gate are."""
    return torch.tensor(value, device=DEVICE)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int, memory: str = "contiguous") -> Tensor:
    """Random values with this memory format; float64 values rounded to the dtype, so that both sides see the same."""
    generator = torch.Generator().manual_seed(seed)
    wide = (*shape[:-1], 2 * shape[-1]) if memory == "every second" else shape
    tensor = torch.randn(wide, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)
    if memory == "channels last":
        tensor = tensor.movedim(1, -1).contiguous().movedim(-1, 1) if len(shape) > 2 else tensor
    elif memory == "transposed":
        tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    elif memory == "every second":
        tensor = tensor[..., ::2]
    return tensor


def distance(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of ``expected``; infinite where ``actual`` is not finite."""
    difference = (actual.double() - expected.double()).norm()
    if not difference.isfinite():
        return float("inf")
    scale = float(expected.double().norm())
    return float(difference) / scale if scale else float(difference)


def layer_weights(features: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A ``[d, r]`` and B ``[r, d]`` of a residual of low rank, lying in memory as two linear layers hold them."""
    down = (values((rank, features), dtype, 2) / features**0.5).t()
    return down, (values((features, rank), dtype, 3) / rank**0.5).t()
