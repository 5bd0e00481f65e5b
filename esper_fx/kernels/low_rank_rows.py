"""y = x + alpha * act(x A) B with whole rows kept on the chip: every byte of x is read once and every byte of y written once.

The kernels of ``esper_fx.kernels.low_rank`` go over the features of their rows twice and read them twice, the second time from
the L2 cache as far as it still holds them: where rows are wide it does not. This one, in Gluon, keeps ``block_m`` whole rows in
shared memory, as chunks of ``block_d`` features that come in by asynchronous copies. A program that has several tiles of rows
gives a chunk of shared memory to its next tile as soon as it has written that chunk of y, and takes the next tile's first
product beside this tile's second: so memory is read and written all the time. Where few rows of warps cover a tile, warps share
out the features of the first product among them and add up.

The backward pass for x is the same with g in the place of x, and B and A in that of A and B.

A and B come through rings of ``depth`` chunks, from the L2 cache: ``rows / block_m`` times each. So tiles of more rows are for
higher ranks, and where rows are so wide that only 16 fit, this does not pay beyond rank 32. The kernel takes 16-bit values
whose features lie side by side, and weights as a linear map's two layers hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from esper_fx.kernels.build_cases import BuildCase
from esper_fx.kernels.device_math import activate, activate_grad
from esper_fx.kernels.launch import ACTIVATIONS, HiddenLaunch, hidden_launch, launch
from esper_fx.kernels.targets import TARGETS, Target

#: From global to shared memory; until Triton 3.8 under another name.
_OLD_NAME = "async_copy_global_to_shared"
async_load = async_copy.async_load if hasattr(async_copy, "async_load") else getattr(async_copy, _OLD_NAME)

#: Ranks whose weights can be copied 16 bytes at a time, and are few enough bytes to be read for every tile of rows.
RANKS = (8, 16, 32, 64)


@dataclass(frozen=True)
class RowsConfig:
    """A configuration of the kernel.

    Attributes:
        block_m: Rows of a tile.
        block_d: Features of a chunk.
        num_warps: Warps per program.
        split: Groups of warps among which the features of the first product are shared out.
        several: Whether a program goes on to further tiles; otherwise there is one program for each tile.
        depth: Chunks that are on their way at once, at most.
    """

    block_m: int
    block_d: int
    num_warps: int
    split: int
    several: bool
    depth: int


#: For rows of up to about 1024 features; of wider ones; of narrow ones in great numbers; and for ranks of 32 and 64.
CONFIGS = (
    RowsConfig(32, 128, 4, 1, False, 4),
    RowsConfig(32, 64, 4, 1, False, 4),
    RowsConfig(16, 256, 4, 4, True, 5),
    RowsConfig(32, 128, 4, 2, True, 4),
    RowsConfig(64, 64, 8, 1, True, 4),
)


@gluon.jit
def copy_rows(
    x_ptr, tiles, tile, chunk, rows, features, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, layout: gl.constexpr
):
    m = tile * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    d = chunk * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, layout))
    mask = (m < rows)[:, None] & (d < features)[None, :]
    async_load(tiles.index(chunk), x_ptr + m.to(gl.int64)[:, None] * features + d[None, :], mask)


@gluon.jit
def copy_weight(
    weight_ptr,
    ring,
    slot,
    chunk,
    features,
    rank: gl.constexpr,
    BLOCK_D: gl.constexpr,
    WIDE: gl.constexpr,
    layout: gl.constexpr,
):
    """A chunk of a weight that lies in memory as [rank, features], WIDE, or [features, rank]."""
    target = ring.index(slot)
    if WIDE:
        r = gl.arange(0, rank, layout=gl.SliceLayout(1, layout))
        d = chunk * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, layout))
        if rank < target.shape[0]:
            target = target.slice(0, rank, 0)
        async_load(target, weight_ptr + r[:, None] * features + d[None, :], (d < features)[None, :])
    else:  # side by side in memory and here, in rows of COLUMNS
        COLUMNS: gl.constexpr = target.shape[1]
        PACK: gl.constexpr = COLUMNS // rank
        line = chunk * (BLOCK_D // PACK) + gl.arange(0, BLOCK_D // PACK, layout=gl.SliceLayout(1, layout))
        column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
        async_load(target, weight_ptr + line[:, None] * COLUMNS + column[None, :], (line * PACK < features)[:, None])


@gluon.jit
def no_product(BLOCK_M: gl.constexpr, rank: gl.constexpr, SPLIT: gl.constexpr, mma: gl.constexpr):
    """What ``first_product`` begins with."""
    return gl.zeros([BLOCK_M, rank] if SPLIT == 1 else [SPLIT, BLOCK_M, rank], gl.float32, mma)


@gluon.jit
def first_product(tile, weight, acc, WIDE: gl.constexpr, SPLIT: gl.constexpr, mma: gl.constexpr):
    """acc + tile [M, D] @ weight, which is [R, D], WIDE, or [D, R]; SPLIT groups of warps each take a part of D."""
    M: gl.constexpr = tile.shape[0]
    D: gl.constexpr = tile.shape[1]
    R: gl.constexpr = weight.shape[0] if WIDE else weight.shape[1]
    if SPLIT == 1:
        a = tile.load(gl.DotOperandLayout(0, mma, 2))
        b = (weight.permute([1, 0]) if WIDE else weight).load(gl.DotOperandLayout(1, mma, 2))
    else:
        a = tile.reshape([M, SPLIT, D // SPLIT]).permute([1, 0, 2]).load(gl.DotOperandLayout(0, mma, 2))
        if WIDE:
            b = weight.reshape([R, SPLIT, D // SPLIT]).permute([1, 2, 0]).load(gl.DotOperandLayout(1, mma, 2))
        else:
            b = weight.reshape([SPLIT, D // SPLIT, R]).load(gl.DotOperandLayout(1, mma, 2))
    return mma_v2(a, b, acc)


@gluon.jit
def beside(left, right):
    """[M, R] and [M, R] as [M, 2 R]."""
    M: gl.constexpr = left.shape[0]
    R: gl.constexpr = left.shape[1]
    return gl.join(left, right).permute([0, 2, 1]).reshape([M, 2 * R])


@gluon.jit(do_not_specialize=("rows",), do_not_specialize_on_alignment=("alpha_ptr", "gate_ptr", "dalpha_ptr"))
def rows_kernel(  # noqa: PLR0915
    x_ptr,
    first_ptr,
    second_ptr,
    alpha_ptr,
    gate_ptr,
    y_ptr,
    hidden_ptr,
    dhidden_ptr,
    dalpha_ptr,
    rows,
    features,
    rank: gl.constexpr,
    ACTIVATION: gl.constexpr,
    BACKWARD: gl.constexpr,
    SAVE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
    CHUNKS: gl.constexpr,
    DEPTH: gl.constexpr,
    SEVERAL: gl.constexpr,
    SPLIT: gl.constexpr,
    WARPS: gl.constexpr,
):
    """y from x; or, BACKWARD, dx from g. The first weight is A, or B; the second is B, or A."""
    WARPS_M: gl.constexpr = BLOCK_M // 16
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS_M, WARPS // WARPS_M], [16, 8])
    parts_mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [SPLIT, WARPS_M, WARPS // WARPS_M // SPLIT], [1, 16, 8])
    first_mma: gl.constexpr = mma if SPLIT == 1 else parts_mma
    LANES: gl.constexpr = BLOCK_D // 8 if BLOCK_D < 256 else 32
    across: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    dtype: gl.constexpr = first_ptr.dtype.element_ty
    # A WIDE weight has rows of BLOCK_D. Of the other, rows are as long as the second product needs: at least 16.
    LEAST: gl.constexpr = 16 if rank < 16 else rank
    COLUMNS: gl.constexpr = rank if BACKWARD else LEAST
    PACK: gl.constexpr = COLUMNS // rank
    PHASE: gl.constexpr = 1 if COLUMNS >= 64 else 64 // COLUMNS
    tall_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [WARPS, 1], [1, 0])
    swizzled_tall: gl.constexpr = gl.SwizzledSharedLayout(8, PHASE, 8 // PHASE, [1, 0])

    tiles = gl.allocate_shared_memory(dtype, [CHUNKS, BLOCK_M, BLOCK_D], swizzled)
    wides = gl.allocate_shared_memory(dtype, [DEPTH, LEAST if BACKWARD else rank, BLOCK_D], swizzled)
    talls = gl.allocate_shared_memory(dtype, [DEPTH, BLOCK_D // PACK, COLUMNS], swizzled_tall)
    if BACKWARD and rank < LEAST:
        for j in gl.static_range(DEPTH):
            wides.index(j).store(gl.zeros([LEAST, BLOCK_D], dtype, across))
    firsts = talls if BACKWARD else wides
    seconds = wides if BACKWARD else talls
    first_layout: gl.constexpr = tall_layout if BACKWARD else across
    second_layout: gl.constexpr = across if BACKWARD else tall_layout
    FIRST_WIDE: gl.constexpr = not BACKWARD

    alpha = gl.load(alpha_ptr)
    factor = gl.where(alpha == 0, 0.0, gl.load(gate_ptr)) if BACKWARD else alpha
    tile_count = gl.cdiv(rows, BLOCK_M)
    tile = gl.program_id(0)
    step = gl.num_programs(0)

    for j in gl.static_range(DEPTH):
        copy_weight(first_ptr, firsts, j, j, features, rank, BLOCK_D, FIRST_WIDE, first_layout)
        copy_rows(x_ptr, tiles, tile, j, rows, features, BLOCK_M, BLOCK_D, across)
        async_copy.commit_group()
    acc = no_product(BLOCK_M, rank, SPLIT, first_mma)
    for i in range(CHUNKS):
        async_copy.wait_group(DEPTH - 1)
        acc = first_product(tiles.index(i), firsts.index(i % DEPTH), acc, FIRST_WIDE, SPLIT, first_mma)
        ahead = i + DEPTH
        if ahead < CHUNKS:
            copy_weight(first_ptr, firsts, i % DEPTH, ahead, features, rank, BLOCK_D, FIRST_WIDE, first_layout)
            copy_rows(x_ptr, tiles, tile, ahead, rows, features, BLOCK_M, BLOCK_D, across)
        else:
            ahead -= CHUNKS
            copy_weight(second_ptr, seconds, ahead % DEPTH, ahead, features, rank, BLOCK_D, BACKWARD, second_layout)
        async_copy.commit_group()

    while tile < tile_count:
        following = tile + step
        more = following < tile_count
        product = acc if SPLIT == 1 else gl.convert_layout(gl.sum(acc, 0), mma)
        m = tile * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, mma))
        r = gl.arange(0, rank, layout=gl.SliceLayout(0, mma))
        places = m.to(gl.int64)[:, None] * rank + r[None, :]
        inside = (m < rows)[:, None]
        if BACKWARD:
            hidden = gl.load(hidden_ptr + places, mask=inside, other=0.0).to(gl.float32)
            products = gl.where(inside, activate(hidden, ACTIVATION) * product, 0.0)
            gl.store(dalpha_ptr + tile, gl.where(alpha == 0, 0.0, gl.sum(gl.sum(products, 1), 0)))
            kept = gl.where(alpha == 0, 0.0, alpha * product * activate_grad(hidden, ACTIVATION)).to(dtype)
            gl.store(dhidden_ptr + places, kept, mask=inside)
            active = kept
        else:
            kept = product.to(dtype)
            if SAVE:
                gl.store(hidden_ptr + places, kept, mask=inside)
            active = activate(kept.to(gl.float32), ACTIVATION).to(dtype)
        if rank < LEAST:
            none = gl.zeros_like(active)
            even = gl.convert_layout(beside(active, none), gl.DotOperandLayout(0, mma, 2))
            odd = gl.convert_layout(beside(none, active), gl.DotOperandLayout(0, mma, 2))
        else:
            even = gl.convert_layout(active, gl.DotOperandLayout(0, mma, 2))
        acc = no_product(BLOCK_M, rank, SPLIT, first_mma)
        for i in range(CHUNKS):
            async_copy.wait_group(DEPTH - 1)
            slot = i % DEPTH
            if BACKWARD:
                weight = seconds.index(slot).load(gl.DotOperandLayout(1, mma, 2))
            else:
                weight = seconds.index(slot).permute([1, 0]).load(gl.DotOperandLayout(1, mma, 2))
            zeros = gl.zeros([BLOCK_M, BLOCK_D // PACK], gl.float32, mma)
            delta = mma_v2(even, weight, zeros)
            if PACK == 2:
                delta = gl.join(delta, mma_v2(odd, weight, zeros)).reshape([BLOCK_M, BLOCK_D])
            x = tiles.index(i).load(delta.type.layout).to(gl.float32)
            if SEVERAL and more & (i >= DEPTH):
                acc = first_product(tiles.index(i - DEPTH), firsts.index(slot), acc, FIRST_WIDE, SPLIT, first_mma)
            y = gl.convert_layout(gl.where(factor == 0, x, x + factor * delta).to(dtype), across)
            if i + DEPTH < CHUNKS:
                copy_weight(second_ptr, seconds, slot, i + DEPTH, features, rank, BLOCK_D, BACKWARD, second_layout)
            if SEVERAL and more:
                copy_weight(first_ptr, firsts, slot, i, features, rank, BLOCK_D, FIRST_WIDE, first_layout)
                copy_rows(x_ptr, tiles, following, i, rows, features, BLOCK_M, BLOCK_D, across)
            async_copy.commit_group()
            row = tile * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, across))
            feature = i * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, across))
            gl.store(
                y_ptr + row.to(gl.int64)[:, None] * features + feature[None, :],
                y,
                mask=(row < rows)[:, None] & (feature < features)[None, :],
            )
        if SEVERAL and more:
            for i in range(CHUNKS - DEPTH, CHUNKS):
                async_copy.wait_group(DEPTH - 1)
                acc = first_product(tiles.index(i), firsts.index(i % DEPTH), acc, FIRST_WIDE, SPLIT, first_mma)
                ahead = i - (CHUNKS - DEPTH)
                copy_weight(second_ptr, seconds, ahead, ahead, features, rank, BLOCK_D, BACKWARD, second_layout)
                async_copy.commit_group()
        tile = following


def forward(
    x: Tensor, down: Tensor, up: Tensor, alpha: Tensor, activation: str, config: int, save: bool
) -> tuple[Tensor, Tensor]:
    """y like ``x``, contiguous with features last, and ``x A`` ``[rows, r]``, empty unless ``save``; see :func:`check`."""
    y, hidden = torch.empty_like(x), x.new_empty((_count(x) if save else 0, down.shape[1]))
    tensors = (x, down.t(), up.t(), alpha, alpha, y, hidden, hidden, alpha)
    _launch(tensors, down.shape[1], activation, config, backward=False, save=save)
    return y, hidden


def backward(
    grad: Tensor, hidden: Tensor, down: Tensor, up: Tensor, alpha: Tensor, gate: Tensor, activation: str, config: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of x like ``grad``; that of ``x A`` ``[rows, r]``; and that of alpha, in parts that are to be added up."""
    dx, dhidden = torch.empty_like(grad), torch.empty_like(hidden)
    dalphas = alpha.new_empty(triton.cdiv(_count(grad), CONFIGS[config].block_m))
    tensors = (grad, up.t(), down.t(), alpha, gate, dx, hidden, dhidden, dalphas)
    _launch(tensors, down.shape[1], activation, config, backward=True, save=True)
    return dx, dhidden, dalphas


def check(x: Tensor, down: Tensor, up: Tensor, dim: int, config: int) -> None:
    """Make sure that the kernel takes these, in this configuration.

    Raises:
        ValueError: It does not; the message says why.
    """
    if not 0 <= config < len(CONFIGS):
        raise ValueError(f"config={config}: expected 0 to {len(CONFIGS) - 1}")
    features, rank = down.shape
    problem = ""
    if not (x.dtype == down.dtype == up.dtype and x.dtype in (torch.bfloat16, torch.float16)):
        problem = f"values and weights in bfloat16 or float16, not {x.dtype} and {down.dtype}"
    elif dim % x.ndim != x.ndim - 1 or not x.is_contiguous():
        problem = f"contiguous values with features in the last dimension, not dimension {dim} and strides {x.stride()}"
    elif features % 16 or rank not in RANKS:
        problem = f"features that are a multiple of 16 and a rank of {RANKS}, not {features} and {rank}"
    elif not (down.t().is_contiguous() and up.t().is_contiguous()):
        problem = f"weights as two layers hold them, not with strides {down.t().stride()} and {up.t().stride()}"
    elif _depth(CONFIGS[config], features, rank, _shared_bytes(x.device)) < 2:
        problem = f"rows that fit the chip's memory, not {CONFIGS[config].block_m} of {features} features"
    if problem:
        raise ValueError(f"the kernel that keeps rows on the chip takes {problem}")


def hidden(x: Tensor, rank: int, activation: str, config: int, *, backward: bool, save: bool) -> HiddenLaunch:
    """What a launch for ``x`` will compile."""
    dtype, float32 = x.dtype, torch.float32
    kinds = (dtype, dtype, dtype, float32, float32, dtype, dtype, dtype, float32)
    numbers = (2, x.shape[-1], rank)  # any number of rows: Triton does not specialise on it
    constants = _constants(x, rank, activation, config, backward=backward, save=save)
    return hidden_launch(rows_kernel, (*kinds, *numbers), constants)


def _launch(
    tensors: tuple[Tensor, ...], rank: int, activation: str, config: int, *, backward: bool, save: bool
) -> None:
    x, tiles = tensors[0], CONFIGS[config]
    constants = _constants(x, rank, activation, config, backward=backward, save=save)
    programs = triton.cdiv(_count(x), tiles.block_m)
    if tiles.several:
        used = _bytes(tiles, constants["DEPTH"], x.shape[-1], rank, backward=backward) + 1024  # which the system takes
        programs = min(programs, max(1, _shared_bytes(x.device) // used) * _processors(x.device))
    launch(rows_kernel, (programs,), *tensors, _count(x), x.shape[-1], rank, traceable=False, **constants)


def _constants(x: Tensor, rank: int, activation: str, config: int, *, backward: bool, save: bool) -> dict[str, Any]:
    tiles, features = CONFIGS[config], x.shape[-1]
    return {
        "ACTIVATION": ACTIVATIONS.index(activation),
        "BACKWARD": backward,
        "SAVE": save,
        "BLOCK_M": tiles.block_m,
        "BLOCK_D": tiles.block_d,
        "CHUNKS": _chunks(tiles, features),
        "DEPTH": _depth(tiles, features, rank, _shared_bytes(x.device)),
        "SEVERAL": tiles.several,
        "SPLIT": tiles.split,
        "WARPS": tiles.num_warps,
        "num_warps": tiles.num_warps,
    }


def _count(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def _chunks(tiles: RowsConfig, features: int) -> int:
    """How many chunks a row has; two at least, because Triton fails to compile an array of one."""
    return max(2, triton.cdiv(features, tiles.block_d))


@cache  # asked at every launch
def _depth(tiles: RowsConfig, features: int, rank: int, shared_bytes: int) -> int:
    """How many chunks can be on their way at once in this much shared memory, in both passes."""
    most = min(tiles.depth, _chunks(tiles, features))
    fitting = (d for d in range(most, 0, -1) if _bytes(tiles, d, features, rank, backward=True) <= shared_bytes)
    return next(fitting, 0)


def _bytes(tiles: RowsConfig, depth: int, features: int, rank: int, *, backward: bool) -> int:
    """Shared memory of a program: its rows, of 16 bits, two rings, and what it takes to rearrange and add up values."""
    rows = _chunks(tiles, features) * tiles.block_d * tiles.block_m
    rings = depth * tiles.block_d * (rank + max(rank, 16) if backward else 2 * rank)
    beside = (
        max(tiles.block_m * tiles.block_d * (2 if rank < 16 else 1), tiles.split * tiles.block_m * max(rank, 16) * 4)
        + 1024
    )
    return 2 * (rows + rings) + beside


@cache
def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return TARGETS["cuda:90"].shared_bytes
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 132


def build_cases() -> Iterator[BuildCase]:
    """What is compiled ahead: both passes in every configuration, at widths for which each is meant."""
    yield _build_case(0, 1024, 16, "identity")
    yield _build_case(1, 768, 8, "gelu")
    for rank in (8, 16):
        yield _build_case(2, 4096, rank, "identity")
    yield _build_case(3, 768, 16, "silu")
    yield _build_case(4, 768, 64, "gelu")


def _build_case(config: int, features: int, rank: int, activation: str) -> BuildCase:
    def call() -> None:
        x = torch.empty((32768, features), dtype=torch.bfloat16, device="meta")
        down, up = x.new_empty((rank, features)).t(), x.new_empty((features, rank)).t()
        alpha = x.new_empty((), dtype=torch.float32)
        _, hidden = forward(x, down, up, alpha, activation, config, save=True)
        backward(x, hidden, down, up, alpha, alpha, activation, config)

    def runs_on(target: Target) -> bool:
        tiles = CONFIGS[config]
        depth = _depth(tiles, features, rank, TARGETS["cuda:90"].shared_bytes)
        return target.backend == "cuda" and _bytes(tiles, depth, features, rank, backward=True) <= target.shared_bytes

    label = f"{features} wide, rank {rank}, {activation}, config {config}"
    return BuildCase(torch.bfloat16, label, call, default=config == 0, runs_on=runs_on)
