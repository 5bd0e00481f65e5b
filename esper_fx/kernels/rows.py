"""A tensor as rows of features, whatever its shape and memory format, without a copy where that is possible."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A tensor seen as ``[samples, positions, features]``.

    Row ``m`` is position ``m % positions`` of sample ``m // positions``; its feature ``d`` lies at
    ``sample * strides[0] + position * strides[1] + d * strides[2]`` elements from the tensor's first.

    Attributes:
        tensor: The tensor itself, or a contiguous copy of one that cannot be seen so.
        samples: Number of samples.
        positions: Rows per sample.
        features: Features per row.
        strides: Of the three dimensions, in elements.
    """

    tensor: Tensor
    samples: int
    positions: int
    features: int
    strides: tuple[int, int, int]

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.samples * self.positions


def rows_of(x: Tensor, dim: int) -> Rows:
    """See ``x`` as rows of what is in dimension ``dim``: the last one, or 1 of a map ``[N, C, *]``.

    Dimensions before ``dim`` and dimensions after it must each collapse into one; where they do not, ``x`` is copied.
    """
    dim = dim % x.ndim
    outer, inner = _collapsed(x, range(dim)), _collapsed(x, range(dim + 1, x.ndim))
    if outer is None or inner is None:
        x = x.contiguous()
        outer, inner = _collapsed(x, range(dim)), _collapsed(x, range(dim + 1, x.ndim))
        assert outer is not None
        assert inner is not None
    (samples, sample_stride), (positions, position_stride) = outer, inner
    # Features last leave one position per sample: Triton drops divisions by a number that is 1 when it compiles.
    return Rows(x, samples, positions, x.shape[dim], (sample_stride, position_stride, x.stride(dim)))


def dense(x: Tensor) -> bool:
    """Whether the elements of ``x`` lie in memory one after the other in some order, without gaps or overlaps."""
    expected = 1
    for stride, size in sorted((x.stride(d), x.shape[d]) for d in range(x.ndim) if x.shape[d] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _collapsed(x: Tensor, dims: range) -> tuple[int, int] | None:
    """Size and stride of these neighbouring dimensions as one, or None where they do not lie so in memory."""
    size = math.prod(x.shape[d] for d in dims)
    kept = [d for d in dims if x.shape[d] != 1]
    if not kept:
        return size, 0
    for outer, inner in zip(kept, kept[1:], strict=False):
        if x.stride(outer) != x.stride(inner) * x.shape[inner] and x.numel():
            return None
    return size, x.stride(kept[-1])
