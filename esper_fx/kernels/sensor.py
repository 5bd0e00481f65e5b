"""(x Omega)ᵀ g: a sketch of the gradient that a linear map at a site would receive, with Omega made where it is needed.

Bytes moved for rows of ``d`` features and ``k`` directions: the first kernel reads x and writes ``x Omega``, ``4 k`` bytes a
row; the second reads that and g. Omega is never in memory: a program hashes the places of the tile it needs. The sums over
rows are taken in a number of parts that the shape fixes, ``4 k d`` bytes each, and the parts are added up afterwards.

Products with Omega's signs are exact, also those of float32, which is the sum of three bfloat16 numbers: tensor cores take
them all, and accumulate in float32 (infinity becomes NaN that way). Products with g are taken in bfloat16 where g is that, in
float32 where it is that, and in TF32 where it is float16, which that holds exactly and without overflow.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper_fx.kernels.build_cases import BuildCase
from esper_fx.kernels.device_math import dot
from esper_fx.kernels.launch import Config, exact, launch, padded, pick
from esper_fx.kernels.rows import rows_of

#: Of the kernel that projects x. The first is the default.
CONFIGS = (
    Config(64, 64, 4, 3),
    Config(32, 128, 4, 3),
    Config(64, 128, 4, 3),
    Config(128, 64, 8, 3),
    Config(16, 128, 4, 3),
)

#: Of the kernel that sums over rows.
SUM_CONFIG = Config(32, 64, 4, 4)

#: About how many programs sum over rows, whatever the shape.
SUM_PROGRAMS = 512


@triton.jit
def hashed(x):
    """lowbias32 of uint32: a bijection whose output bits each depend on all input bits (Wellons, hash-prospector, 2018)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def signs(key, feature, direction, directions):
    """Omega times the root of ``directions``, +-1 in float32, for int32 features ``[d, 1]`` and directions ``[1, k]``."""
    bits = hashed(((feature * directions + direction) ^ key).to(tl.uint32))
    return tl.where((bits >> 31) == 0, 1.0, -1.0)


@triton.jit(do_not_specialize=("key", "rows"))
def project_kernel(
    x_ptr,
    projected_ptr,
    key,
    rows,
    positions,
    features,
    directions,
    x_sample,
    x_position,
    x_feature,
    DIRECTIONS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, DIRECTIONS)
    inside = m < rows
    sample, position = (m // positions).to(tl.int64), (m % positions).to(tl.int64)
    x_rows = x_ptr + sample * x_sample + position * x_position
    projected = tl.zeros([BLOCK_M, DIRECTIONS], tl.float32)
    for start in range(0, features, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        valid = d < features
        x = tl.load(x_rows[:, None] + d[None, :] * x_feature, mask=inside[:, None] & valid[None, :], other=0.0)
        omega = signs(key, d[:, None], j[None, :], directions)
        if x_ptr.dtype.element_ty == tl.float32:
            omega = omega.to(tl.bfloat16)
            high = x.to(tl.bfloat16)
            x -= high.to(tl.float32)
            middle = x.to(tl.bfloat16)
            low = (x - middle.to(tl.float32)).to(tl.bfloat16)
            projected = tl.dot(high, omega, tl.dot(middle, omega, tl.dot(low, omega, projected)))
        else:
            projected = tl.dot(x, omega.to(x_ptr.dtype.element_ty), projected)
    projected = projected / tl.sqrt(tl.zeros_like(projected) + directions)
    tl.store(
        projected_ptr + m.to(tl.int64)[:, None] * directions + j[None, :],
        projected,
        mask=inside[:, None] & (j < directions)[None, :],
    )


@triton.jit(do_not_specialize=("rows",))
def sum_kernel(
    projected_ptr,
    g_ptr,
    parts_ptr,
    rows,
    positions,
    features,
    directions,
    part_rows,
    g_sample,
    g_position,
    g_feature,
    EXACT: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(1)
    j = tl.arange(0, DIRECTIONS)
    valid, kept = d < features, j < directions
    first = part * part_rows
    last = tl.minimum(first + part_rows, rows)
    sums = tl.zeros([DIRECTIONS, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = m < last
        sample, position = (m // positions).to(tl.int64), (m % positions).to(tl.int64)
        projected = tl.load(
            projected_ptr + m.to(tl.int64)[None, :] * directions + j[:, None],
            mask=kept[:, None] & inside[None, :],
            other=0.0,
        )
        g = tl.load(
            g_ptr + (sample * g_sample + position * g_position)[:, None] + d[None, :] * g_feature,
            mask=inside[:, None] & valid[None, :],
            other=0.0,
        )
        if g_ptr.dtype.element_ty == tl.bfloat16:
            sums = dot(projected.to(tl.bfloat16), g, sums, EXACT)
        else:
            sums = dot(projected, g.to(tl.float32), sums, EXACT)
    tl.store(
        parts_ptr + (part.to(tl.int64) * directions + j[:, None]) * features + d[None, :],
        sums,
        mask=kept[:, None] & valid[None, :],
    )


def project(x: Tensor, key: int, directions: int, dim: int, config: int) -> Tensor:
    """``x Omega``, float32 ``[rows, directions]``."""
    rows, tiles = rows_of(x, dim), pick(CONFIGS, config)
    projected = x.new_empty((rows.count, directions), dtype=torch.float32)
    launch(
        project_kernel,
        (triton.cdiv(rows.count, tiles.block_m),),
        rows.tensor,
        projected,
        key,
        rows.count,
        rows.positions,
        rows.features,
        directions,
        *rows.strides,
        config=tiles,
        DIRECTIONS=padded(directions),
        BLOCK_M=tiles.block_m,
        BLOCK_D=tiles.block_d,
    )
    return projected


def forward(x: Tensor, g: Tensor, key: int, directions: int, dim: int, config: int) -> Tensor:
    """The sketch, float32 ``[directions, features]``, for signs made with this key, an int32."""
    projected, rows, tiles = project(x, key, directions, dim, config), rows_of(g, dim), SUM_CONFIG
    blocks = triton.cdiv(rows.features, tiles.block_d)
    parts = max(1, min(triton.cdiv(SUM_PROGRAMS, max(1, blocks)), triton.cdiv(rows.count, tiles.block_m)))
    part_rows = triton.cdiv(triton.cdiv(rows.count, parts), tiles.block_m) * tiles.block_m
    sums = g.new_empty((parts, directions, rows.features), dtype=torch.float32)
    launch(
        sum_kernel,
        (blocks, parts),
        projected,
        rows.tensor,
        sums,
        rows.count,
        rows.positions,
        rows.features,
        directions,
        part_rows,
        *rows.strides,
        config=tiles,
        EXACT=exact(g.dtype),
        DIRECTIONS=padded(directions),
        BLOCK_M=tiles.block_m,
        BLOCK_D=tiles.block_d,
    )
    return sums.sum(0)


def build_cases() -> Iterator[BuildCase]:
    """What is compiled ahead of time: all configurations in bfloat16, and the default one for other dtypes and widths."""
    for config in range(len(CONFIGS)):
        yield _build_case(torch.bfloat16, 16, config)
    yield _build_case(torch.bfloat16, 64, 0)
    for dtype in (torch.float16, torch.float32):
        for directions in (16, 64):
            yield _build_case(dtype, directions, 0)


def _build_case(dtype: torch.dtype, directions: int, config: int) -> BuildCase:
    def call() -> None:
        x = torch.empty((8192, 1024), dtype=dtype, device="meta")
        forward(x, x, 12345, directions, -1, config)

    return BuildCase(dtype, f"{directions} directions, config {config}", call, default=config == 0)
