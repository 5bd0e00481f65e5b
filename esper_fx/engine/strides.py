"""Memory formats between regions: what a kernel returns has the strides that its readers were compiled for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def differing(values: Sequence[Tensor], strides: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Positions of the values whose strides differ from these where that can be told: in dimensions longer than 1.

    Inductor computes a few operations in another memory format than PyTorch, such as `cat` with an empty tensor.
    """
    return tuple(
        position
        for position, (value, expected) in enumerate(zip(values, strides, strict=True))
        if value.numel()
        and any(
            size > 1 and mine != theirs
            for size, mine, theirs in zip(value.shape, value.stride(), expected, strict=True)
        )
    )


def copied(value: Tensor) -> Tensor:
    """A copy with the same strides; gradients flow through it."""
    copy = value.clone()
    return copy if copy.stride() == value.stride() else restrided(value, value.stride())


def restrided(value: Tensor, strides: Sequence[int]) -> Tensor:
    """A copy with these strides; gradients flow through it."""
    # A dimension along which nothing moves in memory holds one element, shown many times.
    single = [size if stride else min(size, 1) for size, stride in zip(value.shape, strides, strict=True)]
    source = value[tuple(slice(size) for size in single)]
    made = torch.empty_strided(single, tuple(strides), dtype=value.dtype, device=value.device)
    return made.copy_(source).expand(value.shape)
