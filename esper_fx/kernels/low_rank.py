"""y = x + alpha * act(x A) B: forward and backward of a low-rank residual.

Bytes moved for ``M`` rows of ``d`` features, beside A and B, which stay in the L2 cache: forward reads x and writes y;
backward reads g and writes dx (rows), then reads x and g (weights). A program handles ``block_m`` whole rows and goes over
their features twice, first to reduce them to ``r`` numbers and then, from the last to the first, to apply these; the second
time they come from the L2 cache, as far as it still holds them. What a row is reduced to, ``hidden``, is kept for the backward
pass: ``r / d`` of the bytes of x.

Statistics of x, where they are asked for, are taken when x is applied, from registers: 32 bytes a program are written.

Weight gradients are summed over rows in a fixed number of parts, one array each, and the parts are added up afterwards, all of
them by one kernel: deterministic, and nothing is gained by atomics, because a part has only ``d * r`` elements.

Products are taken in the dtype of A and B, and accumulated in float32; x may have another one.

One binary serves any number of rows and any place of alpha and gate in the state arrays: Triton is told not to specialise on
these, because a batch that is smaller, or another site, must not wait for a compilation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper_fx.kernels import low_rank_rows
from esper_fx.kernels.build_cases import BuildCase
from esper_fx.kernels.device_math import activate, activate_grad, dot
from esper_fx.kernels.launch import ACTIVATIONS, Config, exact, launch, padded, pick
from esper_fx.kernels.moments import FIELDS, accumulate, merge_partials, store_partial
from esper_fx.kernels.rows import rows_of

#: Of the kernels that go over rows: the forward pass, and the backward pass for x. The first is the default.
CONFIGS = (
    Config(32, 128, 4, 3),
    Config(16, 256, 4, 3),
    Config(32, 256, 4, 3),
    Config(64, 128, 4, 3),
)

#: Configurations there are: beyond these ones, in their order, those of the kernel that keeps rows on the chip.
CONFIG_COUNT = len(CONFIGS) + len(low_rank_rows.CONFIGS)

#: Of the kernel that sums the weights' gradients, for ranks up to 16 and for larger ones.
WEIGHTS_CONFIG, WEIGHTS_CONFIG_WIDE = Config(32, 128, 8, 3), Config(32, 64, 4, 3)

#: About how many programs sum the weights' gradients, whatever the shape: two for each of an H100's multiprocessors.
WEIGHTS_PROGRAMS = 264

#: How many parts of how many elements of a weight's gradient a program adds up at a time.
SUM_PARTS, SUM_BLOCK = 16, 256


@triton.jit(do_not_specialize=("rows",), do_not_specialize_on_alignment=("alpha_ptr",))
def forward_kernel(
    x_ptr,
    down_ptr,
    up_ptr,
    alpha_ptr,
    y_ptr,
    hidden_ptr,
    partials_ptr,
    rows,
    positions,
    features,
    rank,
    x_sample,
    x_position,
    x_feature,
    y_sample,
    y_position,
    y_feature,
    down_feature,
    down_rank,
    up_rank,
    up_feature,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    SAVE: tl.constexpr,
    STATS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, RANK)
    inside, ranked = m < rows, r < rank
    sample, position = (m // positions).to(tl.int64), (m % positions).to(tl.int64)
    x_rows = x_ptr + sample * x_sample + position * x_position
    y_rows = y_ptr + sample * y_sample + position * y_position
    alpha = tl.load(alpha_ptr)
    weight = down_ptr.dtype.element_ty

    hidden = tl.zeros([BLOCK_M, RANK], tl.float32)
    for start in range(0, tl.where(alpha == 0, 0, features), BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        valid = d < features
        x = tl.load(
            x_rows[:, None] + d[None, :] * x_feature,
            mask=inside[:, None] & valid[None, :],
            other=0.0,
            eviction_policy="evict_last",
        )
        down = tl.load(
            down_ptr + d[:, None] * down_feature + r[None, :] * down_rank,
            mask=valid[:, None] & ranked[None, :],
            other=0.0,
        )
        hidden = dot(x.to(weight), down, hidden, EXACT)
    hidden = hidden.to(weight)
    if SAVE:
        tl.store(
            hidden_ptr + m.to(tl.int64)[:, None] * rank + r[None, :], hidden, mask=inside[:, None] & ranked[None, :]
        )
    active = activate(hidden.to(tl.float32), ACTIVATION).to(weight)
    if STATS:
        count = tl.zeros([LANES], tl.float32)
        mean = tl.zeros([LANES], tl.float64)
        squares = tl.zeros([LANES], tl.float64)
        largest = tl.zeros([LANES], tl.float32)
    for step in range(0, features, BLOCK_D):
        d = (features - 1) // BLOCK_D * BLOCK_D - step + tl.arange(0, BLOCK_D)
        valid = d < features
        here = inside[:, None] & valid[None, :]
        x = tl.load(
            x_rows[:, None] + d[None, :] * x_feature,
            mask=here,
            other=float("nan") if STATS else 0.0,  # what is outside is not finite, so not counted
            eviction_policy="evict_first",
        )
        up = tl.load(
            up_ptr + r[:, None] * up_rank + d[None, :] * up_feature, mask=ranked[:, None] & valid[None, :], other=0.0
        )
        delta = dot(active, up, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), EXACT)
        y = tl.where(alpha == 0, x.to(tl.float32), x.to(tl.float32) + alpha * delta)
        tl.store(y_rows[:, None] + d[None, :] * y_feature, y.to(y_ptr.dtype.element_ty), mask=here)
        if STATS:  # as many elements side by side as one load brings a thread, so that it has its lane to itself
            tile = tl.reshape(x, [BLOCK_M * BLOCK_D // (LANES * VECTOR), LANES, VECTOR]).to(tl.float32)
            count, mean, squares, largest = accumulate(count, mean, squares, largest, tile)
    if STATS:
        store_partial(partials_ptr, count, mean, squares, largest)


@triton.jit(do_not_specialize=("rows",), do_not_specialize_on_alignment=("alpha_ptr", "gate_ptr"))
def backward_rows_kernel(
    g_ptr,
    hidden_ptr,
    down_ptr,
    up_ptr,
    alpha_ptr,
    gate_ptr,
    dx_ptr,
    dhidden_ptr,
    dalpha_ptr,
    rows,
    positions,
    features,
    rank,
    g_sample,
    g_position,
    g_feature,
    dx_sample,
    dx_position,
    dx_feature,
    down_feature,
    down_rank,
    up_rank,
    up_feature,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, RANK)
    inside, ranked = m < rows, r < rank
    sample, position = (m // positions).to(tl.int64), (m % positions).to(tl.int64)
    g_rows = g_ptr + sample * g_sample + position * g_position
    dx_rows = dx_ptr + sample * dx_sample + position * dx_position
    alpha, gate = tl.load(alpha_ptr), tl.load(gate_ptr)
    weight = down_ptr.dtype.element_ty
    here = inside[:, None] & ranked[None, :]
    places = m.to(tl.int64)[:, None] * rank + r[None, :]

    back = tl.zeros([BLOCK_M, RANK], tl.float32)  # g Bᵀ
    for start in range(0, tl.where(alpha == 0, 0, features), BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        valid = d < features
        g = tl.load(
            g_rows[:, None] + d[None, :] * g_feature,
            mask=inside[:, None] & valid[None, :],
            other=0.0,
            eviction_policy="evict_last",
        )
        up = tl.load(
            up_ptr + d[:, None] * up_feature + r[None, :] * up_rank, mask=valid[:, None] & ranked[None, :], other=0.0
        )
        back = dot(g.to(weight), up, back, EXACT)
    hidden = tl.load(hidden_ptr + places, mask=here, other=0.0).to(tl.float32)
    products = tl.where(here, activate(hidden, ACTIVATION) * back, 0.0)
    # At once: of sums of sums of a product that lies in tensor memory, Triton before 3.8 fails to compile for sm_100.
    tl.store(dalpha_ptr + tl.program_id(0), tl.where(alpha == 0, 0.0, tl.sum(products)))
    dhidden = tl.where(alpha == 0, 0.0, alpha * back * activate_grad(hidden, ACTIVATION)).to(weight)
    tl.store(dhidden_ptr + places, dhidden, mask=here)

    passed = tl.where(alpha == 0, 0.0, gate)
    for step in range(0, features, BLOCK_D):
        d = (features - 1) // BLOCK_D * BLOCK_D - step + tl.arange(0, BLOCK_D)
        valid = d < features
        place = inside[:, None] & valid[None, :]
        g = tl.load(g_rows[:, None] + d[None, :] * g_feature, mask=place, other=0.0, eviction_policy="evict_first")
        down = tl.load(
            down_ptr + r[:, None] * down_rank + d[None, :] * down_feature,
            mask=ranked[:, None] & valid[None, :],
            other=0.0,
        )
        through = dot(dhidden, down, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), EXACT)
        dx = tl.where(passed == 0, g.to(tl.float32), g.to(tl.float32) + passed * through)
        tl.store(dx_rows[:, None] + d[None, :] * dx_feature, dx.to(dx_ptr.dtype.element_ty), mask=place)


@triton.jit(do_not_specialize=("rows",), do_not_specialize_on_alignment=("alpha_ptr",))
def backward_weights_kernel(
    x_ptr,
    g_ptr,
    hidden_ptr,
    dhidden_ptr,
    alpha_ptr,
    partials_ptr,
    rows,
    positions,
    features,
    rank,
    part_rows,
    x_sample,
    x_position,
    x_feature,
    g_sample,
    g_position,
    g_feature,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(1)
    r = tl.arange(0, RANK)
    valid, ranked = d < features, r < rank
    alpha = tl.load(alpha_ptr)
    weight = hidden_ptr.dtype.element_ty
    first = part * part_rows
    last = tl.minimum(first + part_rows, rows)

    ddown = tl.zeros([BLOCK_D, RANK], tl.float32)
    dup = tl.zeros([BLOCK_D, RANK], tl.float32)
    for start in range(first, tl.where(alpha == 0, first, last), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = m < last
        sample, position = (m // positions).to(tl.int64), (m % positions).to(tl.int64)
        here = valid[:, None] & inside[None, :]
        x = tl.load(
            x_ptr + (sample * x_sample + position * x_position)[None, :] + d[:, None] * x_feature, mask=here, other=0.0
        )
        g = tl.load(
            g_ptr + (sample * g_sample + position * g_position)[None, :] + d[:, None] * g_feature, mask=here, other=0.0
        )
        places = m.to(tl.int64)[:, None] * rank + r[None, :]
        kept = inside[:, None] & ranked[None, :]
        hidden = tl.load(hidden_ptr + places, mask=kept, other=0.0).to(tl.float32)
        dhidden = tl.load(dhidden_ptr + places, mask=kept, other=0.0)
        ddown = dot(x.to(weight), dhidden, ddown, EXACT)
        dup = dot(g.to(weight), activate(hidden, ACTIVATION).to(weight), dup, EXACT)
    # Each lies as the weight of the layer does that it is the gradient of: [r, d] and [d, r].
    ddown_part = partials_ptr + part.to(tl.int64) * features * rank
    dup_part = partials_ptr + (part + tl.num_programs(1)).to(tl.int64) * features * rank
    kept = valid[:, None] & ranked[None, :]
    tl.store(ddown_part + r[None, :] * features + d[:, None], ddown, mask=kept)
    tl.store(dup_part + d[:, None] * rank + r[None, :], tl.where(alpha == 0, 0.0, alpha * dup), mask=kept)


@triton.jit(do_not_specialize=("parts", "programs"))
def sum_kernel(
    partials_ptr,
    dalphas_ptr,
    ddown_ptr,
    dup_ptr,
    dalpha_ptr,
    size,
    parts,
    programs,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.program_id(1)
    of_weight = partials_ptr + weight.to(tl.int64) * parts * size
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        total += tl.sum(
            tl.load(
                of_weight + part.to(tl.int64)[:, None] * size + place[None, :],
                mask=(part < parts)[:, None] & (place < size)[None, :],
                other=0.0,
            ),
            0,
        )
    target = ddown_ptr if weight == 0 else dup_ptr
    tl.store(target + place, total.to(ddown_ptr.dtype.element_ty), mask=place < size)
    if (tl.program_id(0) == 0) & (weight == 0):
        dalpha = tl.zeros([PARTS * BLOCK], tl.float32)
        for start in range(0, programs, PARTS * BLOCK):
            program = start + tl.arange(0, PARTS * BLOCK)
            dalpha += tl.load(dalphas_ptr + program, mask=program < programs, other=0.0)
        tl.store(dalpha_ptr, tl.sum(dalpha, 0))


def forward(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    alpha: Tensor,
    activation: str,
    dim: int,
    config: int,
    save: bool,
    stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like ``x``, hidden ``[rows, r]`` in the dtype of ``down`` (empty unless ``save``), and moments of ``x`` by program.

    These are float64 ``[4, programs]``, for ``merge_partials``, and empty unless ``stats``.
    """
    if config >= len(CONFIGS) and not stats:
        y, hidden = torch.ops.esper.low_rank_rows(x, down, up, alpha, activation, dim, config - len(CONFIGS), save)
        return y, hidden, x.new_empty((FIELDS, 0), dtype=torch.float64)
    rows, tiles = rows_of(x, dim), _fitted(_tiles(config), down.dtype)
    rank = down.shape[1]
    y = torch.empty_like(rows.tensor)
    out = rows_of(y, dim)
    hidden = down.new_empty((rows.count if save else 0, rank))
    programs, vector = triton.cdiv(rows.count, tiles.block_m), 16 // x.element_size()
    partials = x.new_empty((FIELDS, programs if stats else 0), dtype=torch.float64)
    launch(
        forward_kernel,
        (programs,),
        rows.tensor,
        down,
        up,
        alpha,
        y,
        hidden,
        partials,
        rows.count,
        rows.positions,
        rows.features,
        rank,
        *rows.strides,
        *out.strides,
        *down.stride(),
        *up.stride(),
        config=tiles,
        ACTIVATION=ACTIVATIONS.index(activation),
        EXACT=exact(down.dtype),
        SAVE=save,
        STATS=stats,
        LANES=min(32 * tiles.num_warps, tiles.block_m * tiles.block_d // vector),
        VECTOR=vector,
        RANK=padded(rank),
        BLOCK_M=tiles.block_m,
        BLOCK_D=tiles.block_d,
    )
    return y, hidden, partials


def backward(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    alpha: Tensor,
    gate: Tensor,
    activation: str,
    dim: int,
    config: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, A ``[d, r]``, B ``[r, d]`` and alpha (0-dim float32)."""
    g, rows = rows_of(grad, dim), rows_of(x, dim)
    rank = down.shape[1]
    shared: dict[str, Any] = {
        "ACTIVATION": ACTIVATIONS.index(activation),
        "EXACT": exact(down.dtype),
        "RANK": padded(rank),
    }
    if config >= len(CONFIGS):
        of_rows = torch.ops.esper.low_rank_rows_backward
        dx, dhidden, dalphas = of_rows(grad, hidden, down, up, alpha, gate, activation, dim, config - len(CONFIGS))
    else:
        tiles = _fitted(_tiles(config), down.dtype)
        dx = torch.empty_like(rows.tensor)
        dhidden, dalphas = torch.empty_like(hidden), alpha.new_empty(triton.cdiv(rows.count, tiles.block_m))
        launch(
            backward_rows_kernel,
            (len(dalphas),),
            g.tensor,
            hidden,
            down,
            up,
            alpha,
            gate,
            dx,
            dhidden,
            dalphas,
            rows.count,
            rows.positions,
            rows.features,
            rank,
            *g.strides,
            *rows_of(dx, dim).strides,
            *down.stride(),
            *up.stride(),
            config=tiles,
            BLOCK_M=tiles.block_m,
            BLOCK_D=tiles.block_d,
            **shared,
        )
    tiles = _fitted(WEIGHTS_CONFIG if rank <= 16 else WEIGHTS_CONFIG_WIDE, down.dtype)
    blocks = triton.cdiv(rows.features, tiles.block_d)
    parts = max(1, min(triton.cdiv(WEIGHTS_PROGRAMS, blocks), triton.cdiv(rows.count, tiles.block_m)))
    part_rows = triton.cdiv(triton.cdiv(rows.count, parts), tiles.block_m) * tiles.block_m
    size = rank * rows.features
    partials = down.new_empty((2, parts, size), dtype=torch.float32)
    launch(
        backward_weights_kernel,
        (blocks, parts),
        rows.tensor,
        g.tensor,
        hidden,
        dhidden,
        alpha,
        partials,
        rows.count,
        rows.positions,
        rows.features,
        rank,
        part_rows,
        *rows.strides,
        *g.strides,
        config=tiles,
        BLOCK_M=tiles.block_m,
        BLOCK_D=tiles.block_d,
        **shared,
    )
    # Each lies as the weight of the layer does that it is the gradient of.
    ddown, dup = down.new_empty((rank, rows.features)), up.new_empty((rows.features, rank))
    dalpha = torch.empty_like(alpha)
    grid = (max(1, triton.cdiv(size, SUM_BLOCK)), 2)
    arguments = (partials, dalphas, ddown, dup, dalpha, size, parts, len(dalphas))
    launch(sum_kernel, grid, *arguments, PARTS=SUM_PARTS, BLOCK=SUM_BLOCK)
    return dx, ddown.t(), dup.t(), dalpha


def _tiles(config: int) -> Config:
    """The configuration with this number, and the default one for the numbers of those that keep rows on the chip."""
    return CONFIGS[0] if len(CONFIGS) <= config < CONFIG_COUNT else pick(CONFIGS, config)


def _fitted(config: Config, dtype: torch.dtype) -> Config:
    """The configuration for products of this dtype.

    A float32 tile is twice as large, and exact products are made of single multiplications, whose operands all lie in
    registers at once: so it has half the rows and a quarter of the features, but a full cache line of them.
    """
    if dtype != torch.float32:
        return config
    return replace(config, block_m=max(16, config.block_m // 2), block_d=max(32, config.block_d // 4))


def build_cases() -> Iterator[BuildCase]:
    """What is compiled ahead: usual dtypes and ranks, all configurations, and the activation that takes most registers."""
    for rank in (16, 8, 64):
        yield _build_case(torch.bfloat16, rank)
    yield _build_case(torch.float16, 16)
    for rank in (16, 64):
        yield _build_case(torch.float32, rank)
    for dtype in (torch.bfloat16, torch.float32):
        yield _build_case(dtype, 64, activation="gelu")
    for config in range(1, len(CONFIGS)):
        yield _build_case(torch.bfloat16, 16, config)
    for rank in (16, 64):
        yield _build_case(torch.bfloat16, rank, stats=True)
    yield _build_case(torch.float32, 16, stats=True)


def _build_case(
    dtype: torch.dtype, rank: int, config: int = 0, activation: str = "identity", stats: bool = False
) -> BuildCase:
    def call() -> None:
        x = torch.empty((8192, 1024), dtype=dtype, device="meta")
        down, up = x.new_empty((rank, 1024)).t(), x.new_empty((1024, rank)).t()  # as the layers' weights lie in memory
        alpha = x.new_empty((), dtype=torch.float32)
        _, hidden, partials = forward(x, down, up, alpha, activation, -1, config, save=True, stats=stats)
        if stats:
            merge_partials(partials, x.numel())
        else:
            backward(x, x, hidden, down, up, alpha, alpha, activation, -1, config)

    middle = ("" if activation == "identity" else f"{activation}, ") + "statistics, " * stats
    return BuildCase(dtype, f"rank {rank}, {middle}config {config}", call, default=config == 0)
