"""The kernels of esper::site_stats against float64, and that of esper::low_rank that does the same on its way."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper_fx.kernels import site_stats as kernels
from esper_fx.kernels.launch import launch
from esper_fx.kernels.moments import FIELDS, MERGE_LANES, accumulate, gather, merge_partials, total, trusted
from esper_fx.ops.low_rank import low_rank, low_rank_stats
from esper_fx.ops.site_stats import reference, site_stats
from tests.support.kernels import DEVICE, alphas, dtypes, memory_formats, scalar, values

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")

BAD = (float("nan"), float("inf"), float("-inf"))

shapes = st.one_of(
    st.just(()),
    st.lists(st.integers(0, 12), min_size=1, max_size=4).map(tuple),
    st.integers(1, 9000).map(lambda n: (n,)),
    st.tuples(st.integers(1, 60), st.integers(1, 300)),
)


def assert_close(stats: Tensor, right: Tensor) -> None:
    """Counts and the largest value to the bit; the mean as near as it counts beside the deviations; M2 to 1e-5."""
    count, mean, squares, largest, nonfinite = stats.tolist()
    right_count, right_mean, right_squares, right_largest, right_nonfinite = right.tolist()
    assert stats.dtype == torch.float64
    assert (count, largest, nonfinite) == (right_count, right_largest, right_nonfinite)
    assert abs(mean - right_mean) <= 1e-7 * abs(right_mean) + 1e-6 * math.sqrt(right_squares / max(count, 1))
    assert squares == pytest.approx(right_squares, rel=1e-5, abs=1e-12 * count * right_mean**2)


def spoil(x: Tensor, every: int) -> Tensor:
    """Put values that are not finite at every so manieth place, in turn."""
    places = torch.arange(x.numel(), device=x.device).view(x.shape)
    for number, bad in enumerate(BAD):
        x.masked_fill_(places % (3 * every) == number * every, bad)
    return x


@settings(max_examples=60)
@given(
    shapes,
    dtypes,
    memory_formats,
    st.sampled_from([(0.0, 1.0), (1e6, 1.0), (-3.0, 1e-3), (0.0, 1e-30), (1e30, 1e30), (5e4, 10.0)]),
    st.sampled_from([0, 1, 2, 7, 1000]),
    st.integers(0, len(kernels.CONFIGS) - 1),
    st.integers(0, 1000),
)
def test_statistics_are_those_of_float64(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory: str,
    normal: tuple[float, float],
    bad: int,
    config: int,
    seed: int,
) -> None:
    if len(shape) < 2:
        memory = "contiguous"
    mean, deviation = normal
    x = values(shape, dtype, seed, memory)
    x.copy_(x.float() * deviation + mean)  # in place, to keep its strides
    x = spoil(x, bad) if bad else x
    assert_close(site_stats(x, config), reference(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_what_exact_arithmetic_says(dtype: torch.dtype) -> None:
    x = (values((3, 41, 53), torch.float32, 1) * 2 + 100).to(dtype)
    x[1, 2, 3], x[0, 0, 0], x[2, 40, 52] = BAD
    numbers = [Fraction(number) for number in x.flatten().tolist() if math.isfinite(number)]
    mean = sum(numbers) / len(numbers)
    squares = math.fsum((number - mean) ** 2 for number in numbers)
    right = [len(numbers), float(mean), squares, max(abs(float(number)) for number in numbers), 3]
    assert_close(site_stats(x), torch.tensor(right, dtype=torch.float64))


@pytest.mark.parametrize(
    "kind",
    ["first is far out", "first tile is far out", "first tile is bad", "drifts", "constant", "two", "alternates"],
)
def test_nothing_is_lost_to_cancellation(kind: str) -> None:
    x = values((33_001,), torch.float32, 2) + 1e4
    if kind == "first is far out":
        x[0] = 1e9
    elif kind == "first tile is far out":
        x[:4096] -= 1e7
    elif kind == "first tile is bad":
        x[:4096] = float("nan")
    elif kind == "drifts":
        x += torch.linspace(0, 1e6, len(x), device=DEVICE)
    elif kind == "constant":
        x = torch.full_like(x, 12345.678)
    elif kind == "two":
        x = x[:2].clone()
    else:
        x[::2] += 1e6
    assert_close(site_stats(x), reference(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e38, 1e25, 1e-25, 1e-37, 1e-42])
def test_squares_neither_overflow_nor_vanish(dtype: torch.dtype, size: float) -> None:
    x = (values((5000,), torch.float64, 3) / 2 * size).clamp(-3e38, 3e38).to(dtype)
    x[0] = float("-inf")
    right = reference(x)
    got = site_stats(x)
    assert got[[0, 3, 4]].tolist() == right[[0, 3, 4]].tolist()
    deviation = float(right[2] / right[0]) ** 0.5
    assert float(got[1]) == pytest.approx(float(right[1]), rel=0, abs=1e-6 * deviation)
    assert float(got[2]) == pytest.approx(float(right[2]), rel=1e-5, abs=0)


def exactly(parts: list[tuple[int, float, float]]) -> tuple[int, float, float]:
    """Count, mean and M2 of disjoint sets together, by exact arithmetic on their own."""
    count = sum(n for n, _, _ in parts)
    mean = sum(n * Fraction(m) for n, m, _ in parts) / count
    squares = sum(Fraction(s) + n * (Fraction(m) - mean) ** 2 for n, m, s in parts)
    return count, float(mean), float(squares)


@pytest.mark.parametrize("programs", [1, 7, MERGE_LANES, 3 * MERGE_LANES + 5])
def test_partial_results_of_billions_merge_as_exact_arithmetic_says(programs: int) -> None:
    parts = []
    for program in range(programs):
        count = 2_000_003 + 977 * program if program % 5 else 0
        parts.append((count, (1e6 + 0.001 * (program % 13)) * bool(count), count * (1.0 + 0.1 * (program % 3))))
    parts[-1] = (4_000_000_007, 1e6 + 0.25, 4e9)
    partials = torch.tensor([[*part, float(number)] for number, part in enumerate(parts)], dtype=torch.float64)
    elements = sum(n for n, _, _ in parts) + 5
    stats = merge_partials(partials.t().contiguous().to(DEVICE), elements).tolist()
    count, mean, squares = exactly(parts)
    assert stats[0] == count
    assert stats[1] == pytest.approx(mean, rel=1e-15)
    assert stats[2] == pytest.approx(squares, rel=1e-10)  # 1e6 is 1e-10 off, and means are 0.1 apart
    assert stats[3:] == [programs - 1, 5]


def test_one_program_among_those_that_share_a_billion_elements() -> None:
    """A lane adds up as many tiles as one gets of 1e9 float32 elements; the test above merges results of such programs."""
    loads, lanes, vector = (
        kernels.CONFIGS[0].block_m,
        8,
        4,
    )  # fewer lanes to save time: each is on its own until the end
    tiles = math.ceil(1e9 / kernels.MOST_LANES / (loads * vector))
    assert tiles > 450
    x = values((tiles * loads * lanes * vector,), torch.float32, 4) + 1e6
    partials = torch.empty((FIELDS, 1), dtype=torch.float64, device=DEVICE)
    launch(kernels.partial_kernel, (1,), x, partials, x.numel(), LOADS=loads, LANES=lanes, VECTOR=vector, STAGES=2)
    assert_close(merge_partials(partials, x.numel()), reference(x))


@pytest.mark.parametrize("tiles", [0.5, 2, 7.3, 8.9])
def test_tiles_and_what_is_left_over_are_dealt_out_to_three_programs(tiles: float) -> None:
    x = values((int(tiles * 4 * 8 * 4),), torch.float32, 7)
    partials = torch.empty((FIELDS, 3), dtype=torch.float64, device=DEVICE)
    launch(kernels.partial_kernel, (3,), x, partials, x.numel(), LOADS=4, LANES=8, VECTOR=4, STAGES=2)
    assert_close(merge_partials(partials, x.numel()), reference(x))


@triton.jit
def _short_way(x_ptr, trusted_ptr, TILES: tl.constexpr, LOADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    place = (tl.arange(0, LOADS)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]) * VECTOR
    place += tl.arange(0, VECTOR)[None, None, :]
    shift = total(tl.load(x_ptr + place)) / (LOADS * VECTOR)
    sums = tl.zeros([LANES], tl.float32)
    squares = tl.zeros([LANES], tl.float32)
    largest = tl.zeros([LANES], tl.float32)
    for tile in range(TILES):
        x = tl.load(x_ptr + tile * LOADS * LANES * VECTOR + place)
        sums, squares, largest = gather(sums, squares, largest, x, shift)
    count = tl.full([LANES], TILES * LOADS * VECTOR, tl.float32)
    tl.store(trusted_ptr, trusted(count, shift, sums, squares, largest).to(tl.int32))


@pytest.mark.parametrize(
    ("kind", "right"),
    [
        ("normal", 1),
        ("far from 0", 1),
        ("zero", 1),
        ("constant", 1),
        ("first tile far out", 0),
        ("nan", 0),
        ("tiny", 0),
        ("huge", 0),
    ],
)
def test_the_short_way_is_trusted_where_it_can_be(kind: str, right: int) -> None:
    x = values((8, 4, 8, 4), torch.float32, 3)
    changed = {
        "far from 0": x + 1e3,
        "zero": x * 0,
        "constant": x * 0 + 12345.678,
        "first tile far out": torch.cat([x[:1] + 1e6, x[1:]]),
        "nan": x.clone().index_put_((torch.tensor(7),) + (torch.tensor(1),) * 3, torch.tensor(float("nan"))),
        "tiny": x * 1e-20,
        "huge": x * 1e20,
    }
    found = torch.full((1,), -1, dtype=torch.int32, device=DEVICE)
    launch(_short_way, (1,), changed.get(kind, x), found, TILES=8, LOADS=4, LANES=8, VECTOR=4)
    assert int(found) == right


@triton.jit
def _one_more_tile(state_ptr, x_ptr, LOADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    lane = tl.arange(0, LANES)
    place = (tl.arange(0, LOADS)[:, None, None] * LANES + lane[None, :, None]) * VECTOR
    x = tl.load(x_ptr + place + tl.arange(0, VECTOR)[None, None, :])
    count, mean, squares, largest = accumulate(
        tl.load(state_ptr + lane).to(tl.float32),
        tl.load(state_ptr + LANES + lane),
        tl.load(state_ptr + 2 * LANES + lane),
        tl.load(state_ptr + 3 * LANES + lane).to(tl.float32),
        x,
    )
    tl.store(state_ptr + lane, count.to(tl.float64))
    tl.store(state_ptr + LANES + lane, mean)
    tl.store(state_ptr + 2 * LANES + lane, squares)
    tl.store(state_ptr + 3 * LANES + lane, largest.to(tl.float64))


def test_a_tile_more_counts_where_a_lane_has_seen_millions() -> None:
    loads, lanes, vector = 4, 128, 4
    x = values((loads, lanes, vector), torch.float32, 5) * 3 + 1e6
    before = [(8_000_000 + lane, 1e6 + lane / 7, 8e6 * (1 + lane / 100)) for lane in range(lanes)]
    state = torch.tensor([[*lane, 2.0] for lane in before], dtype=torch.float64).t().contiguous().to(DEVICE)
    launch(_one_more_tile, (1,), state, x, LOADS=loads, LANES=lanes, VECTOR=vector)
    for lane in range(lanes):
        numbers = x[:, lane].flatten().tolist()
        count, mean, squares = exactly([before[lane], *((1, number, 0.0) for number in numbers)])
        got = state[:, lane].tolist()
        assert got[0] == count
        assert got[1] - before[lane][1] == pytest.approx(mean - before[lane][1], rel=1e-5, abs=1e-9)
        assert got[2] - before[lane][2] == pytest.approx(squares - before[lane][2], rel=1e-5)
        assert got[3] == max(numbers)


def test_the_same_values_give_the_same_bits() -> None:
    x = values((300, 70), torch.float32, 6)
    assert torch.equal(site_stats(x), site_stats(x.clone()))


low_rank_shapes = st.one_of(
    st.tuples(st.integers(0, 40), st.integers(1, 200)).map(lambda s: (s, -1)),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20)).map(lambda s: (s, 1)),
)


@settings(max_examples=12)
@given(low_rank_shapes, dtypes, memory_formats, alphas, st.booleans(), st.sampled_from([0, 1, 3]), st.integers(0, 1000))
def test_low_rank_takes_statistics_and_changes_nothing_by_it(
    shape_and_dim: tuple[tuple[int, ...], int],
    dtype: torch.dtype,
    memory: str,
    alpha: float,
    spoiled: bool,
    config: int,
    seed: int,
) -> None:
    shape, dim = shape_and_dim
    x = values(shape, dtype, seed, memory)
    x = (spoil(x, 11) if spoiled else x).requires_grad_()
    down, up = values((shape[dim], 4), dtype, seed + 2), values((4, shape[dim]), dtype, seed + 3)
    arguments = (x, down, up, scalar(alpha), scalar(1.0), "gelu", dim, config)
    y, hidden = low_rank(*arguments)
    y_too, hidden_too, stats = low_rank_stats(*arguments)
    assert_close(stats, reference(x.detach()))
    assert torch.allclose(y, y_too, rtol=0, atol=0, equal_nan=True)
    assert torch.allclose(hidden, hidden_too, rtol=0, atol=0, equal_nan=True)
    assert not stats.requires_grad
    upstream = values(shape, dtype, seed + 1)
    gradients = [torch.autograd.grad(output, x, upstream)[0] for output in (y, y_too)]
    assert torch.allclose(*gradients, rtol=0, atol=0, equal_nan=True)
