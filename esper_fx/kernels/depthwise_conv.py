"""y = x + alpha * (conv(x) + bias) with a filter of its own for every channel: forward and backward of the residual.

Bytes moved for a map ``[N, C, H, W]``, beside the filters: forward reads x and writes y; backward reads g and writes dx (the
same kernel with the filter flipped), then reads x and g (filters). A program's tile is a rectangle of positions in some
channels. It reads the tile once for every element of the filter, shifted: from memory the first time, then from the L1
cache, and the rim of ``kernel_size - 1`` rows and columns that it shares with its neighbours from L2.

The filters' gradients are summed in registers, one sum for every element of the filter and of the tile, over all tiles of a
part of the map, and only then across the tile; the parts are added up afterwards: deterministic, without atomics. A program
holds as many rows of the filter as registers allow; where that is not all, others read the same tiles of x and g at
about the same time, from L2.

1-d is 2-d with one row. One binary serves any number of samples and any place of alpha and gate in the state arrays: Triton
does not specialise on these.
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
    Config(64, 16, 4, 1),
    Config(64, 8, 4, 1),
    Config(64, 32, 8, 1),
    Config(128, 16, 4, 1),
)

#: Of the kernel that sums the filters' gradients.
WEIGHTS_CONFIG = Config(64, 8, 4, 1)

#: Of how many elements of the filter a program keeps the sums: as many registers of a thread for every 128 elements of a tile.
HELD = 9


@triton.jit(do_not_specialize_on_alignment=("alpha_ptr", "gate_ptr"))
def convolve_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    alpha_ptr,
    gate_ptr,
    y_ptr,
    features,
    height,
    width,
    x_sample,
    x_position,
    x_feature,
    y_sample,
    y_position,
    y_feature,
    weight_feature,
    weight_row,
    weight_column,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    """y from x; or, BACKWARD, dx from g, with the filter flipped, no bias, and alpha times gate as the factor."""
    tiles_down, tiles_across, blocks = tl.cdiv(height, TILE_H), tl.cdiv(width, TILE_W), tl.cdiv(features, BLOCK_C)
    program = tl.program_id(0)
    lane = tl.arange(0, TILE_H * TILE_W)
    w = program % tiles_across * TILE_W + lane % TILE_W
    h = program // tiles_across % tiles_down * TILE_H + lane // TILE_W
    plane = program // (tiles_across * tiles_down)
    c = plane % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    sample = (plane // blocks).to(tl.int64)
    valid, inside = c < features, (h < height) & (w < width)
    channels, places = c.to(tl.int64)[:, None], (h.to(tl.int64) * width + w)[None, :]
    x_tile = x_ptr + sample * x_sample + channels * x_feature + places * x_position
    factor = tl.load(alpha_ptr)
    if BACKWARD:
        factor = tl.where(factor == 0, 0.0, factor * tl.load(gate_ptr))

    total = tl.zeros([BLOCK_C, TILE_H * TILE_W], tl.float32)
    for i in range(0, tl.where(factor == 0, 0, ROWS)):
        row = h + (i - ROWS // 2)
        within = inside & (row >= 0) & (row < height)
        for j in tl.static_range(COLUMNS):
            column = w + (j - COLUMNS // 2)
            here = valid[:, None] & (within & (column >= 0) & (column < width))[None, :]
            shift = tl.cast(i - ROWS // 2, tl.int64) * width + (j - COLUMNS // 2)
            x = tl.load(x_tile + shift * x_position, mask=here, other=0.0)
            if BACKWARD:
                element = c * weight_feature + (ROWS - 1 - i) * weight_row + (COLUMNS - 1 - j) * weight_column
            else:
                element = c * weight_feature + i * weight_row + j * weight_column
            weight = tl.load(weight_ptr + element, mask=valid, other=0.0)
            total += x.to(tl.float32) * weight.to(tl.float32)[:, None]
    if not BACKWARD:
        total += tl.load(bias_ptr + c, mask=valid, other=0.0).to(tl.float32)[:, None]
    here = valid[:, None] & inside[None, :]
    x = tl.load(x_tile, mask=here, other=0.0).to(tl.float32)
    y = tl.where(factor == 0, x, x + factor * total)
    tl.store(
        y_ptr + sample * y_sample + channels * y_feature + places * y_position, y.to(y_ptr.dtype.element_ty), mask=here
    )


@triton.jit(do_not_specialize=("samples", "part_steps"), do_not_specialize_on_alignment=("alpha_ptr",))
def weights_kernel(
    x_ptr,
    g_ptr,
    alpha_ptr,
    dweight_ptr,
    dbias_ptr,
    samples,
    features,
    height,
    width,
    part_steps,
    x_sample,
    x_position,
    x_feature,
    g_sample,
    g_position,
    g_feature,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HELD_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    """Sums of g and of g times x shifted, over a part: ``[parts, features]`` and ``[parts, features, ROWS, COLUMNS]``."""
    tiles_down, tiles_across, blocks = tl.cdiv(height, TILE_H), tl.cdiv(width, TILE_W), tl.cdiv(features, BLOCK_C)
    GROUPS: tl.constexpr = (ROWS + HELD_ROWS - 1) // HELD_ROWS
    program = tl.program_id(0)
    first_row = program % GROUPS * HELD_ROWS
    c = program // GROUPS % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    part = program // (GROUPS * blocks)
    lane = tl.arange(0, TILE_H * TILE_W)
    valid = c < features
    channels = c.to(tl.int64)[:, None]
    first = part * part_steps
    last = tl.minimum(first + part_steps, samples * tiles_down * tiles_across)

    of_bias = tl.zeros([BLOCK_C, TILE_H * TILE_W], tl.float32)
    sums = ()  # grown by +: triton knows no (*sums, new)
    for _ in tl.static_range(HELD_ROWS * COLUMNS):
        sums = sums + (tl.zeros([BLOCK_C, TILE_H * TILE_W], tl.float32),)  # type: ignore[assignment] # noqa: RUF005
    for step in range(first, tl.where(tl.load(alpha_ptr) == 0, first, last)):
        w = step % tiles_across * TILE_W + lane % TILE_W
        h = step // tiles_across % tiles_down * TILE_H + lane // TILE_W
        sample = (step // (tiles_across * tiles_down)).to(tl.int64)
        inside = (h < height) & (w < width)
        places = (h.to(tl.int64) * width + w)[None, :]
        x_tile = x_ptr + sample * x_sample + channels * x_feature + places * x_position
        g_tile = g_ptr + sample * g_sample + channels * g_feature + places * g_position
        g = tl.load(g_tile, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
        of_bias += g
        added = ()
        for t in tl.static_range(HELD_ROWS * COLUMNS):
            i, j = first_row + t // COLUMNS - ROWS // 2, t % COLUMNS - COLUMNS // 2
            row, column = h + i, w + j
            within = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            shift = i.to(tl.int64) * width + j
            x = tl.load(x_tile + shift * x_position, mask=valid[:, None] & within[None, :], other=0.0)
            added = added + (sums[t] + g * x.to(tl.float32),)  # type: ignore[assignment] # noqa: RUF005
        sums = added
    place = part.to(tl.int64) * features + c
    tl.store(dbias_ptr + place, tl.sum(of_bias, 1), mask=c < tl.where(first_row == 0, features, 0))
    for t in tl.static_range(HELD_ROWS * COLUMNS):
        i = first_row + t // COLUMNS
        tl.store(
            dweight_ptr + (place * ROWS + i) * COLUMNS + t % COLUMNS,
            tl.sum(sums[t], 1),
            mask=c < tl.where(i < ROWS, features, 0),
        )


def forward(x: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, config: int) -> Tensor:
    """y, laid out like ``x`` ``[N, C, L]`` or ``[N, C, H, W]``."""
    return _convolve(x, weight, bias, alpha, alpha, x, config, backward=False)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, gate: Tensor, config: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of x; and of the filters and the bias, float32, for an alpha of 1, but 0 where alpha is 0."""
    dx = _convolve(grad, weight, weight, alpha, gate, x, config, backward=True)
    rows, g, tiles = rows_of(x, 1), rows_of(grad, 1), WEIGHTS_CONFIG
    (height, width), (filter_rows, filter_columns) = _plane(x), _plane(weight)
    block_c, tile_h, tile_w = _tile(rows, height, width, tiles)
    held_rows = min(filter_rows, max(1, HELD // filter_columns))
    programs = triton.cdiv(filter_rows, held_rows) * triton.cdiv(rows.features, block_c)
    steps = rows.samples * triton.cdiv(height, tile_h) * triton.cdiv(width, tile_w)
    parts, part_steps = parts_for(steps, programs)
    dweight = x.new_empty((parts, *weight.shape), dtype=torch.float32)
    dbias = x.new_empty((parts, rows.features), dtype=torch.float32)
    launch(
        weights_kernel,
        (programs * parts,),
        rows.tensor,
        g.tensor,
        alpha,
        dweight,
        dbias,
        rows.samples,
        rows.features,
        height,
        width,
        part_steps,
        *rows.strides,
        *g.strides,
        config=tiles,
        ROWS=filter_rows,
        COLUMNS=filter_columns,
        HELD_ROWS=held_rows,
        BLOCK_C=block_c,
        TILE_H=tile_h,
        TILE_W=tile_w,
    )
    return dx, dweight.sum(0), dbias.sum(0)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor,
    gate: Tensor,
    like: Tensor,
    config: int,
    *,
    backward: bool,
) -> Tensor:
    rows, tiles = rows_of(x, 1), pick(CONFIGS, config)
    y = torch.empty_like(like)
    out = rows_of(y, 1)
    (height, width), (filter_rows, filter_columns) = _plane(x), _plane(weight)
    block_c, tile_h, tile_w = _tile(rows, height, width, tiles)
    planes = rows.samples * triton.cdiv(rows.features, block_c)
    launch(
        convolve_kernel,
        (planes * triton.cdiv(height, tile_h) * triton.cdiv(width, tile_w),),
        rows.tensor,
        weight,
        bias,
        alpha,
        gate,
        y,
        rows.features,
        height,
        width,
        *rows.strides,
        *out.strides,
        weight.stride(0),
        weight.stride(2) if weight.ndim == 4 else 0,
        weight.stride(-1),
        config=tiles,
        BACKWARD=backward,
        ROWS=filter_rows,
        COLUMNS=filter_columns,
        BLOCK_C=block_c,
        TILE_H=tile_h,
        TILE_W=tile_w,
    )
    return y


def _plane(x: Tensor) -> tuple[int, int]:
    """Rows and columns of a plane of ``[N, C, L]`` or ``[N, C, H, W]``."""
    return (x.shape[2] if x.ndim == 4 else 1), x.shape[-1]


def _tile(rows: Rows, height: int, width: int, tiles: Config) -> tuple[int, int, int]:
    """Channels, rows and columns of a tile: of as many elements as the configuration says, however few there are of one."""
    elements = tiles.block_m * tiles.block_d
    channels_inner = rows.strides[2] == 1 and rows.strides[1] != 1
    channels = power_of_two(rows.features, tiles.block_m) if channels_inner else 1
    positions = elements // channels
    # Long rows where positions are dense, for the loads' sake; otherwise a square, whose rim is the shortest.
    across = 1 << (positions.bit_length() // 2) if channels_inner else 64
    columns = power_of_two(width, min(across, positions))
    lines = power_of_two(height, positions // columns)
    columns = power_of_two(width, positions // lines)
    return power_of_two(rows.features, elements // (lines * columns)), lines, columns


def build_cases() -> Iterator[BuildCase]:
    """What is compiled ahead: usual filters, large and small planes, memory formats and dtypes, and all configurations."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield _build_case(dtype, (56, 56), 3)
    yield _build_case(torch.bfloat16, (7, 7), 3)
    yield _build_case(torch.bfloat16, (1024,), 3)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        yield _build_case(torch.bfloat16, (56, 56), 7, memory_format)
    yield _build_case(torch.bfloat16, (56, 56), 3, torch.channels_last)
    for config in range(1, len(CONFIGS)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            yield _build_case(torch.bfloat16, (56, 56), 3, memory_format, config)


def _build_case(
    dtype: torch.dtype,
    plane: tuple[int, ...],
    kernel_size: int,
    memory_format: torch.memory_format = torch.contiguous_format,
    config: int = 0,
) -> BuildCase:
    def call() -> None:
        x = torch.empty((32, 256, *plane), dtype=dtype, device="meta").to(memory_format=memory_format)
        weight, bias = x.new_empty((256, 1, *(kernel_size for _ in plane))), x.new_empty(256)
        alpha = x.new_empty((), dtype=torch.float32)
        forward(x, weight, bias, alpha, config)
        backward(x, x, weight, alpha, alpha, config)

    layout = "channels last" if memory_format == torch.channels_last else "contiguous"
    sizes, filters = "x".join(map(str, plane)), "x".join(str(kernel_size) for _ in plane)
    return BuildCase(dtype, f"{filters} on {sizes}, {layout}, config {config}", call, default=config == 0)
