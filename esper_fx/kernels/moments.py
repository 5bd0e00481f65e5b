"""Count, mean, M2 and largest absolute value of finite numbers, gathered by kernels that have the numbers in registers.

The long way (``accumulate``): a program keeps these four for each of its ``LANES`` threads and adds to them a tile at a
time. A tile's mean is taken first and then the deviations from it, whose own sum corrects that mean (Chan, Golub, LeVeque:
"Algorithms for computing the sample variance", 1983, equation 1.7); tiles, threads and programs are merged by their formula
2.1, with means and M2 in float64. A count in float32 is exact up to 2**24 numbers a thread, and there are tens of thousands of
threads. A tile is scaled by a power of two, so that no square overflows float32 or vanishes in it.

The short way (``gather``), for a program that can go over its numbers again: each thread sums deviations, and their squares,
from the mean of the first tile that it sees, in float32: five instructions a number. At the end it is checked whether these
sums can be ``trusted``: not, if something was not finite, if squares overflowed or vanished, or if the first tile was so far
from the rest that little is left of the squares when the mean is taken out. Then the program goes the long way.

Either way it merges its threads at the end and stores one partial result (``store_partial``): 32 bytes a program. A second
kernel of one program merges these (``merge_partials``). The order of all sums is fixed by the shape.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper_fx.kernels.launch import launch

#: What a partial result holds: count, mean, M2, largest absolute value.
FIELDS = 4

#: Partial results that are merged side by side.
MERGE_LANES = 512


@triton.jit
def total(x):
    """Sum over the first and last dimension of a tile ``[loads, lanes, vector]``, which a thread has to itself."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def gather(sums, squares, largest, x, shift):
    """Add a tile ``[loads, lanes, vector]`` to each lane's sums of what is apart from ``shift``, all float32.

    What does not count has to be equal to the shift.
    """
    apart = x - shift[None, :, None]
    top = tl.max(tl.max(tl.abs(x), 2), 0)
    return sums + total(apart), squares + total(apart * apart), tl.maximum(largest, top)


@triton.jit
def trusted(count, shift, sums, squares, largest):
    """Whether mean and M2 of all lanes can be had from these sums with few rounding errors."""
    count = tl.maximum(count, 1.0)
    left = squares - sums * sums / count
    spread = (left >= 0.25 * squares) & ((squares > 1e-30) | (largest == 0))
    # Nothing but the rounding errors of the shift itself: all numbers are the same.
    same = (tl.abs(shift) > 1e-12) & (squares <= count * (shift * 2**-20) * (shift * 2**-20))
    return tl.min(((spread | same) & (squares < 1e38)).to(tl.int32), 0) == 1


@triton.jit
def store_gathered(partials_ptr, count, shift, sums, squares, largest):
    """Store what ``gather`` has summed, as ``store_partial`` does."""
    sums = sums.to(tl.float64)
    apart = sums / tl.maximum(count, 1.0).to(tl.float64)
    squares = tl.maximum(squares.to(tl.float64) - sums * apart, 0.0)
    store_partial(partials_ptr, count, shift.to(tl.float64) + apart, squares, largest)


@triton.jit
def merge(count, mean, squares, more_count, more_mean, more_squares):
    """Count, mean and M2 of two disjoint sets together, elementwise; an empty set has mean 0."""
    both = count + more_count
    share = more_count / tl.maximum(both, 1.0)
    apart = more_mean - mean
    return both, mean + apart * share, squares + more_squares + apart * apart * (count * share)


@triton.jit
def scales(top):
    """A power of two next to ``1 / top``, by which a lane's numbers are scaled, and its reciprocal, float64.

    From the exponent bits of ``top``, float32 ``[lanes]``, and such that both are normal numbers.
    """
    bits = tl.minimum(tl.maximum(0x7F000000 - (top.to(tl.int32, bitcast=True) & 0x7F800000), 0x00800000), 0x7E800000)
    unscale = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    return bits.to(tl.float32, bitcast=True)[None, :, None], unscale.to(tl.float64)


@triton.jit
def accumulate(count, mean, squares, largest, x):
    """Add a tile to what each lane has seen.

    Args:
        count: Finite numbers seen, float32 ``[lanes]``.
        mean: Of them, float64.
        squares: Sum of their squared deviations from the mean, float64.
        largest: Largest absolute value, float32.
        x: Float32 ``[loads, lanes, vector]``; whatever is not finite in it is left out.
    """
    top = tl.max(tl.max(tl.abs(x), 2), 0)
    scale, unscale = scales(top)
    more = tl.full(top.shape, x.shape[0] * x.shape[2], tl.float32)
    center = total(x * scale) / more
    if tl.min((tl.abs(center) < float("inf")).to(tl.int32), 0) == 1:  # nearly always, and half the work
        apart = x * scale - center[None, :, None]
        rest, spread = total(apart), total(apart * apart)
    else:
        finite = tl.abs(x) < float("inf")
        kept = tl.where(finite, x, 0.0)
        top = tl.max(tl.max(tl.abs(kept), 2), 0)
        scale, unscale = scales(top)
        more = total(finite.to(tl.float32))
        center = total(kept * scale) / tl.maximum(more, 1.0)
        apart = tl.where(finite, kept * scale - center[None, :, None], 0.0)
        rest, spread = total(apart), total(apart * apart)
    correction = rest / tl.maximum(more, 1.0)
    more_mean = (center.to(tl.float64) + correction.to(tl.float64)) * unscale
    more_squares = tl.maximum(spread - rest * correction, 0.0).to(tl.float64) * unscale * unscale
    count, mean, squares = merge(count, mean, squares, more, more_mean, more_squares)
    return count, mean, squares, tl.maximum(largest, top)


@triton.jit
def across(count, mean, squares):
    """Count, mean and M2 of all lanes together, from float64 ``[lanes]``."""
    all_count = tl.sum(count, 0)
    center = tl.sum(count * mean, 0) / tl.maximum(all_count, 1.0)
    apart = mean - center
    return all_count, center, tl.sum(squares + count * apart * apart, 0)


@triton.jit
def store_partial(partials_ptr, count, mean, squares, largest):
    """Store what the lanes of this program have seen, into ``[FIELDS, programs]``."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    count, mean, squares = across(count.to(tl.float64), mean, squares)
    tl.store(partials_ptr + program, count)
    tl.store(partials_ptr + programs + program, mean)
    tl.store(partials_ptr + 2 * programs + program, squares)
    tl.store(partials_ptr + 3 * programs + program, tl.max(largest, 0).to(tl.float64))


@triton.jit(do_not_specialize=("partials", "elements"))
def merge_kernel(partials_ptr, stats_ptr, partials, elements, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    count = tl.zeros([LANES], tl.float64)
    mean = tl.zeros([LANES], tl.float64)
    squares = tl.zeros([LANES], tl.float64)
    largest = tl.zeros([LANES], tl.float64)
    for start in range(0, partials, LANES):
        place = start + lane
        valid = place < partials
        more = tl.load(partials_ptr + place, mask=valid, other=0.0)
        more_mean = tl.load(partials_ptr + partials + place, mask=valid, other=0.0)
        more_squares = tl.load(partials_ptr + 2 * partials + place, mask=valid, other=0.0)
        top = tl.load(partials_ptr + 3 * partials + place, mask=valid, other=0.0)
        count, mean, squares = merge(count, mean, squares, more, more_mean, more_squares)
        largest = tl.maximum(largest, top)
    count, mean, squares = across(count, mean, squares)
    tl.store(stats_ptr, count)
    tl.store(stats_ptr + 1, mean)
    tl.store(stats_ptr + 2, squares)
    tl.store(stats_ptr + 3, tl.max(largest, 0))
    tl.store(stats_ptr + 4, elements - count)


def merge_partials(partials: Tensor, elements: int) -> Tensor:
    """Merge partial results.

    Args:
        partials: Float64 ``[FIELDS, programs]``.
        elements: How many numbers the programs have looked at together, finite or not.

    Returns:
        Float64 ``[5]``: number of finite values, mean, M2, largest absolute value, number of non-finite values.
    """
    stats = torch.empty(5, dtype=torch.float64, device=partials.device)
    launch(merge_kernel, (1,), partials, stats, partials.shape[1], elements, LANES=MERGE_LANES)
    return stats
