"""Count, mean, M2, largest absolute value and number of non-finite values of a tensor.

Bytes moved: x is read once, in the order it lies in memory, or twice by a program whose numbers need the long way of
``esper_fx.kernels.moments``. Beside it partial results of 32 bytes a program are written, and read by the kernel that merges
them: 528 programs by default, fewer for a small x.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper_fx.kernels.build_cases import BuildCase
from esper_fx.kernels.launch import Config, launch, pick
from esper_fx.kernels.moments import (
    FIELDS,
    accumulate,
    gather,
    merge_partials,
    store_gathered,
    store_partial,
    total,
    trusted,
)
from esper_fx.kernels.rows import dense

#: ``block_m`` loads of 16 bytes, ``num_stages`` deep, are in flight in each of ``block_d`` lanes; a thread is one lane or more.
#: The first is the default.
CONFIGS = (
    Config(2, 128, 4, 4),
    Config(4, 128, 4, 1),
    Config(4, 256, 8, 1),
)

#: Lanes of all programs together: 512 for each of an H100's multiprocessors keep its memory busy, and all run at once.
MOST_LANES = 512 * 132


@triton.jit(do_not_specialize=("elements",))
def partial_kernel(
    x_ptr, partials_ptr, elements, LOADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr
):
    TILE: tl.constexpr = LOADS * LANES * VECTOR
    load = tl.arange(0, LOADS)[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    piece = lane * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    place = load * LANES * VECTOR + piece
    program = tl.program_id(0)
    tiles = elements // TILE
    end = tiles.to(tl.int64) * TILE
    first, stride = program.to(tl.int64) * TILE, tl.num_programs(0).to(tl.int64) * TILE
    count = tl.zeros([LANES], tl.float32)
    shift = tl.zeros([LANES], tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    squares = tl.zeros([LANES], tl.float32)
    largest = tl.zeros([LANES], tl.float32)
    if first < end:
        x = tl.load(x_ptr + first + place).to(tl.float32)
        shift = total(x) / (LOADS * VECTOR)
        sums, squares, largest = gather(sums, squares, largest, x, shift)
        count += LOADS * VECTOR
    for start in tl.range(first + stride, end, stride, num_stages=STAGES):
        x = tl.load(x_ptr + start + place).to(tl.float32)
        sums, squares, largest = gather(sums, squares, largest, x, shift)
        count += LOADS * VECTOR
    # What is left over is next in turn; apart and piece by piece, so that no mask stands in the way of wide loads.
    if program == tiles % tl.num_programs(0):
        for start in range(end, elements, LANES * VECTOR):
            inside = piece < elements - start
            x = tl.load(x_ptr + start + piece, mask=inside, other=0.0).to(tl.float32)
            more = total(inside.to(tl.float32))
            shift = tl.where(count == 0, total(x) / tl.maximum(more, 1.0), shift)
            sums, squares, largest = gather(sums, squares, largest, tl.where(inside, x, shift[None, :, None]), shift)
            count += more
    if trusted(count, shift, sums, squares, largest):
        store_gathered(partials_ptr, count, shift, sums, squares, largest)
    else:
        count = tl.zeros([LANES], tl.float32)
        mean = tl.zeros([LANES], tl.float64)
        spread = tl.zeros([LANES], tl.float64)
        largest = tl.zeros([LANES], tl.float32)
        for tile in range(first, elements, stride):
            for part in range(LOADS):
                start = tile + part * LANES * VECTOR
                x = tl.load(x_ptr + start + piece, mask=piece < elements - start, other=float("nan"))
                count, mean, spread, largest = accumulate(count, mean, spread, largest, x.to(tl.float32))
        store_partial(partials_ptr, count, mean, spread, largest)


def forward(x: Tensor, config: int) -> Tensor:
    """Statistics of ``x``, float64 ``[5]``; ``x`` is copied where it has gaps or overlaps in memory."""
    tiles = pick(CONFIGS, config)
    x = x if dense(x) else x.contiguous()
    vector = 16 // x.element_size()
    programs = min(MOST_LANES // tiles.block_d, triton.cdiv(x.numel(), tiles.block_m * tiles.block_d * vector))
    partials = torch.empty((FIELDS, programs), dtype=torch.float64, device=x.device)
    launch(
        partial_kernel,
        (programs,),
        x,
        partials,
        x.numel(),
        config=tiles,
        LOADS=tiles.block_m,
        LANES=tiles.block_d,
        VECTOR=vector,
        STAGES=tiles.num_stages,
    )
    return merge_partials(partials, x.numel())


def build_cases() -> Iterator[BuildCase]:
    """What is compiled ahead of time: all configurations in bfloat16, and the default one in other dtypes."""
    for config in range(len(CONFIGS)):
        yield _build_case(torch.bfloat16, config)
    for dtype in (torch.float16, torch.float32):
        yield _build_case(dtype, 0)


def _build_case(dtype: torch.dtype, config: int) -> BuildCase:
    def call() -> None:
        forward(torch.empty((8192, 1024), dtype=dtype, device="meta"), config)

    return BuildCase(dtype, f"config {config}", call, default=config == 0)
