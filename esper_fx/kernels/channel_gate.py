"""Two kernels for a gate on every channel of a map: one sums over positions, one scales; forward and backward use both.

Bytes moved for a map ``[N, C, *]``, beside what has ``N * C`` elements: forward reads x (sums), then reads x and writes y
(scales); backward reads x and g (sums), then reads g and writes dx (scales). The second kernel goes through the map in the
opposite order, so that what the first one read last comes from the L2 cache: all of it, where the map is no larger than that.

A program sums a tile of channels over the positions of one part of one sample; where the channels of all samples are too few
to fill a GPU, a sample has several parts, added up afterwards: deterministic, without atomics. The small layers between
the two kernels are ATen's, in ``esper_fx.ops.channel_gate``: their bytes do not count.

One binary serves any number of samples and any place of alpha in the state arrays: Triton does not specialise on these.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper_fx.kernels.build_cases import BuildCase
from esper_fx.kernels.launch import Config, launch, pick
from esper_fx.kernels.rows import Rows, rows_of
from esper_fx.kernels.tiles import parts_for, power_of_two

#: ``block_m`` is how far a tile reaches in the dimension that is dense in memory, ``block_d`` in the other one: positions and
#: channels of contiguous maps, channels and positions of channels_last ones. The first is the default.
CONFIGS = (
    Config(1024, 1, 4, 1),
    Config(512, 1, 4, 1),
    Config(512, 4, 4, 1),
    Config(2048, 2, 8, 1),
)


@triton.jit(do_not_specialize=("samples", "parts", "part_steps"), do_not_specialize_on_alignment=("alpha_ptr",))
def sum_kernel(
    x_ptr,
    g_ptr,
    alpha_ptr,
    sums_ptr,
    samples,
    features,
    positions,
    parts,
    part_steps,
    x_sample,
    x_position,
    x_feature,
    g_sample,
    g_position,
    g_feature,
    PRODUCT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sum x, or g * x, over the positions of a part: ``sums`` is ``[parts, samples, features]``, 0 where alpha is 0."""
    blocks = tl.cdiv(features, BLOCK_C)
    program = tl.program_id(0)
    block, part, sample = program % blocks, program // blocks % parts, program // (blocks * parts)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    lanes = tl.arange(0, BLOCK_P)
    valid = c < features
    alpha = tl.load(alpha_ptr)
    x_planes = x_ptr + sample.to(tl.int64) * x_sample + c.to(tl.int64)[:, None] * x_feature
    g_planes = g_ptr + sample.to(tl.int64) * g_sample + c.to(tl.int64)[:, None] * g_feature
    first = part * part_steps * BLOCK_P
    last = tl.minimum(first + part_steps * BLOCK_P, positions)

    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(first, tl.where(alpha == 0, first, last), BLOCK_P):
        p = start + lanes
        here = valid[:, None] & (p < positions)[None, :]
        places = p.to(tl.int64)[None, :]
        if PRODUCT:
            x = tl.load(x_planes + places * x_position, mask=here, other=0.0, eviction_policy="evict_first")
            g = tl.load(g_planes + places * g_position, mask=here, other=0.0, eviction_policy="evict_last")
            total += g.to(tl.float32) * x.to(tl.float32)
        else:
            x = tl.load(x_planes + places * x_position, mask=here, other=0.0, eviction_policy="evict_last")
            total += x.to(tl.float32)
    row = part.to(tl.int64) * samples + sample
    tl.store(sums_ptr + row * features + c, tl.sum(total, 1), mask=valid)


@triton.jit(do_not_specialize_on_alignment=("switch_ptr",))
def scale_kernel(
    x_ptr,
    factor_ptr,
    offset_ptr,
    switch_ptr,
    y_ptr,
    features,
    positions,
    x_sample,
    x_position,
    x_feature,
    y_sample,
    y_position,
    y_feature,
    OFFSET: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """y = x + x * factor + offset, with a factor and an offset for every channel of every sample; x where switch is 0."""
    position_blocks, channel_blocks = tl.cdiv(positions, BLOCK_P), tl.cdiv(features, BLOCK_C)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    c = program // position_blocks % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = program % position_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    sample = (program // (position_blocks * channel_blocks)).to(tl.int64)
    valid = c < features
    here = valid[:, None] & (p < positions)[None, :]
    planes, places = c.to(tl.int64)[:, None], p.to(tl.int64)[None, :]
    switch = tl.load(switch_ptr)

    x = tl.load(
        x_ptr + sample * x_sample + planes * x_feature + places * x_position,
        mask=here,
        other=0.0,
        eviction_policy="evict_first",
    ).to(tl.float32)
    factor = tl.load(factor_ptr + sample * features + c, mask=valid, other=0.0)
    y = x + x * factor[:, None]
    if OFFSET:
        y += tl.load(offset_ptr + sample * features + c, mask=valid, other=0.0)[:, None]
    y = tl.where(switch == 0, x, y)
    tl.store(
        y_ptr + sample * y_sample + planes * y_feature + places * y_position, y.to(y_ptr.dtype.element_ty), mask=here
    )


def pool(x: Tensor, alpha: Tensor, config: int) -> Tensor:
    """Means of ``x`` ``[N, C, *]`` over positions, ``[N, C]`` float32; 0 where alpha is 0, without reading x."""
    rows = rows_of(x, 1)
    return _sums(rows, rows, alpha, config, product=False) / rows.positions


def dots(grad: Tensor, x: Tensor, alpha: Tensor, config: int) -> Tensor:
    """Sums of ``grad * x`` over positions, ``[N, C]`` float32; 0 where alpha is 0, without reading either."""
    return _sums(rows_of(x, 1), rows_of(grad, 1), alpha, config, product=True)


def scale(x: Tensor, factor: Tensor, offset: Tensor | None, switch: Tensor, like: Tensor, config: int) -> Tensor:
    """``x + x * factor + offset`` at every position, and exactly ``x`` where ``switch`` is 0.

    Args:
        x: ``[N, C, *]``.
        factor: ``[N, C]`` float32, contiguous.
        offset: ``[N, C]`` float32, contiguous; None is 0.
        switch: 0-dim float32.
        like: What the result is shaped, typed and laid out in memory like.
        config: Number of the tile configuration.
    """
    rows, tiles = rows_of(x, 1), pick(CONFIGS, config)
    y = torch.empty_like(like)
    out = rows_of(y, 1)
    block_c, block_p = _tile(rows, tiles)
    launch(
        scale_kernel,
        (rows.samples * triton.cdiv(rows.features, block_c) * triton.cdiv(rows.positions, block_p),),
        rows.tensor,
        factor,
        factor if offset is None else offset,
        switch,
        y,
        rows.features,
        rows.positions,
        *rows.strides,
        *out.strides,
        config=tiles,
        OFFSET=offset is not None,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
    )
    return y


def _sums(x: Rows, g: Rows, alpha: Tensor, config: int, *, product: bool) -> Tensor:
    tiles = pick(CONFIGS, config)
    block_c, block_p = _tile(x, tiles)
    blocks = x.samples * triton.cdiv(x.features, block_c)
    parts, part_steps = parts_for(triton.cdiv(x.positions, block_p), blocks)
    sums = x.tensor.new_empty((parts, x.samples, x.features), dtype=torch.float32)
    launch(
        sum_kernel,
        (blocks * parts,),
        x.tensor,
        g.tensor,
        alpha,
        sums,
        x.samples,
        x.features,
        x.positions,
        parts,
        part_steps,
        *x.strides,
        *g.strides,
        config=tiles,
        PRODUCT=product,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
    )
    return sums.sum(0) if parts > 1 else sums[0]


def _tile(rows: Rows, tiles: Config) -> tuple[int, int]:
    """Channels and positions of a tile: of as many elements as the configuration says, however few there are of one."""
    elements = tiles.block_m * tiles.block_d
    if rows.strides[2] == 1 and rows.strides[1] != 1:
        channels = power_of_two(rows.features, tiles.block_m)
        return channels, power_of_two(rows.positions, elements // channels)
    positions = power_of_two(rows.positions, tiles.block_m)
    return power_of_two(rows.features, elements // positions), positions


def build_cases() -> Iterator[BuildCase]:
    """What is compiled ahead: large and small planes, both memory formats, usual dtypes, all configurations."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            yield _build_case(dtype, 56, memory_format)
        yield _build_case(dtype, 7, torch.contiguous_format)
    for config in range(1, len(CONFIGS)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            yield _build_case(torch.bfloat16, 56, memory_format, config)


def _build_case(dtype: torch.dtype, side: int, memory_format: torch.memory_format, config: int = 0) -> BuildCase:
    def call() -> None:
        x = torch.empty((32, 256, side, side), dtype=dtype, device="meta").to(memory_format=memory_format)
        alpha, values = x.new_empty((), dtype=torch.float32), x.new_empty((32, 256), dtype=torch.float32)
        pool(x, alpha, config)
        dots(x, x, alpha, config)
        scale(x, values, None, alpha, x, config)
        scale(x, values, values, alpha, x, config)

    layout = "channels last" if memory_format == torch.channels_last else "contiguous"
    return BuildCase(dtype, f"{side}x{side}, {layout}, config {config}", call, default=config == 0)
