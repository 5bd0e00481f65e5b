"""Triton kernels as users write them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale(x_ptr, factor, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(x_ptr + place, tl.load(x_ptr + place) * factor)


@triton.jit
def shift(x_ptr, factor, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(x_ptr + place, tl.load(x_ptr + place) + factor)


@triton.autotune(configs=[triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 32})], key=[])
@triton.jit
def tuned(x_ptr, factor, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(x_ptr + place, tl.load(x_ptr + place) * factor)
