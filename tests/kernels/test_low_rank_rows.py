"""The kernel of esper::low_rank that keeps rows on the chip: against float64, what it takes, and what it will compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from esper_fx.kernels import low_rank_rows as kernels
from esper_fx.kernels.launch import ACTIVATIONS, recording
from esper_fx.kernels.low_rank import CONFIG_COUNT, CONFIGS
from esper_fx.ops.low_rank import hidden_launches, low_rank
from tests.kernels.test_low_rank import actual, expected
from tests.support.kernels import TOLERANCE, alphas, distance, gates, layer_weights, values

configs = st.integers(len(CONFIGS), CONFIG_COUNT - 1)
#: Rows and features: tiles that are not full, chunks that are not, one chunk only.
shapes = st.one_of(
    st.tuples(st.integers(1, 70), st.integers(1, 20).map(lambda n: 16 * n)),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 8).map(lambda n: 16 * n)),
)
#: On a GPU there is time for more: rows as wide as models have, more tiles than processors.
LARGE = ((37, 1040), (5003, 768), (2600, 4096))


def check_against_float64(
    shape: tuple[int, ...], rank: int, dtype: torch.dtype, alpha: float, gate: float, activation: str, config: int
) -> None:
    x, upstream = values(shape, dtype, 0), values(shape, dtype, 1)
    arguments = (x, *layer_weights(shape[-1], rank, dtype), alpha, gate, activation, -1, upstream)
    right = expected(*arguments)
    found = actual(*arguments, config)
    for name, got, want in zip(("y", "x", "A", "B"), found, right, strict=False):
        assert distance(got, want) <= TOLERANCE[dtype], name
    # A gradient of alpha near 0 is what large terms leave: the rounding is theirs.
    terms = upstream.double().norm() * ((right[0] - x.double()).norm() / (abs(alpha) or 1.0) + 1)
    assert abs(float(found[4]) - float(right[4])) <= TOLERANCE[dtype] * float(terms)


@settings(max_examples=25)
@given(
    shapes,
    st.sampled_from(kernels.RANKS),
    st.sampled_from([torch.bfloat16, torch.float16]),
    alphas,
    gates,
    st.sampled_from(ACTIVATIONS),
    configs,
)
def test_values_and_gradients_are_those_of_float64(
    shape: tuple[int, ...],
    rank: int,
    dtype: torch.dtype,
    alpha: float,
    gate: float,
    activation: str,
    config: int,
) -> None:
    check_against_float64(shape, rank, dtype, alpha, gate, activation, config)


@pytest.mark.parametrize(
    ("config", "shape"), [(4, (40, 1040)), (5, (40, 560)), (6, (40, 1600)), (7, (70, 1040)), (8, (140, 400))]
)
@pytest.mark.parametrize("rank", [8, 64])
def test_more_chunks_than_are_on_their_way_at_once(config: int, shape: tuple[int, ...], rank: int) -> None:
    """Several tiles for a program, too, where it can take them."""
    check_against_float64(shape, rank, torch.bfloat16, 0.5, 0.75, "silu", config)


@pytest.mark.gpu
@pytest.mark.parametrize("config", range(len(CONFIGS), CONFIG_COUNT))
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("rank", kernels.RANKS)
def test_values_and_gradients_of_large_inputs(config: int, shape: tuple[int, ...], rank: int) -> None:
    tiles = kernels.CONFIGS[config - len(CONFIGS)]
    if shape[-1] == 4096 and (tiles.block_m > 16 or rank > 32):
        pytest.skip("rows that do not fit the chip's memory")
    dtype = torch.float16 if rank == 32 else torch.bfloat16
    activation = ACTIVATIONS[(config + len(shape) + rank) % 4]
    check_against_float64(shape, rank, dtype, 0.5, 0.75, activation, config)


@pytest.mark.parametrize("config", range(len(CONFIGS), CONFIG_COUNT))
@pytest.mark.parametrize("rank", kernels.RANKS)
def test_at_alpha_0_nothing_leaks(config: int, rank: int) -> None:
    x, upstream = values((100, 64), torch.bfloat16, 0), values((100, 64), torch.bfloat16, 1)
    down, up = (torch.full_like(weight, float("nan")) for weight in layer_weights(64, rank, torch.bfloat16))
    y, dx, *others = actual(x, down, up, 0.0, 1.0, "gelu", -1, upstream, config)
    assert torch.equal(y, x)
    assert torch.equal(dx, upstream)
    assert not any(other.any() for other in others)


def test_it_gives_the_same_bits_again_and_for_a_view_that_is_not_aligned() -> None:
    storage = values((100 * 64 + 1,), torch.bfloat16, 0)
    x, upstream = storage[1:].view(100, 64), values((100, 64), torch.bfloat16, 1)
    arguments = (*layer_weights(64, 16, torch.bfloat16), 0.5, 0.75, "silu", -1, upstream, len(CONFIGS) + 2)
    first = actual(x.clone(), *arguments)
    for again in (x, x.clone()):
        assert all(map(torch.equal, actual(again, *arguments), first))


def example(
    shape: tuple[int, ...] = (40, 1024), rank: int = 16, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x, x.new_empty((rank, shape[-1])).t(), x.new_empty((shape[-1], rank)).t()


@pytest.mark.parametrize("config", range(len(kernels.CONFIGS)))
@pytest.mark.parametrize("rank", kernels.RANKS)
def test_it_takes_what_it_is_meant_for(config: int, rank: int) -> None:
    kernels.check(*example((40, 768), rank), -1, config)
    kernels.check(*example((2, 3, 16), rank, torch.float16), 2, config)


@pytest.mark.parametrize(
    ("arguments", "dim", "problem"),
    [
        (example(dtype=torch.float32), -1, "bfloat16 or float16, not torch.float32"),
        ((example()[0], *example(dtype=torch.float16)[1:]), -1, "not torch.bfloat16 and torch.float16"),
        (example((8, 16, 16)), 1, "features in the last dimension, not dimension 1"),
        ((example()[0].new_empty((1024, 40)).t(), *example()[1:]), -1, "contiguous values"),
        (example((40, 1000)), -1, "a multiple of 16 and a rank of .*, not 1000"),
        (example(rank=17), -1, "not 1024 and 17"),
        ((example()[0], example()[1].contiguous(), example()[2]), -1, "weights as two layers hold them"),
        (example((40, 16384)), -1, "rows that fit the chip's memory, not 32 of 16384 features"),
    ],
)
def test_what_it_does_not_take_is_named(arguments: tuple[Tensor, Tensor, Tensor], dim: int, problem: str) -> None:
    with pytest.raises(ValueError, match=f"the kernel that keeps rows on the chip takes .*{problem}"):
        kernels.check(*arguments, dim, 0)


def test_a_configuration_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="config=5: expected 0 to 4"):
        kernels.check(*example(), -1, 5)


@pytest.mark.parametrize("config", range(len(kernels.CONFIGS)))
def test_its_results_are_as_large_as_the_operators_say(config: int) -> None:
    with FakeTensorMode():
        x, down, up = (torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in example((40, 64)))
        alpha = torch.empty(())
        y, hidden = torch.ops.esper.low_rank_rows(x, down, up, alpha, "gelu", -1, config, True)
        backward = torch.ops.esper.low_rank_rows_backward
        dx, dhidden, dalphas = backward(y, hidden, down, up, alpha, alpha, "gelu", -1, config)
    with recording() as launches:
        launched = kernels.forward(*example((40, 64)), alpha.to("meta"), "gelu", config, save=True)
        launched += kernels.backward(
            launched[0], launched[1], *example((40, 64))[1:], alpha.to("meta"), alpha.to("meta"), "gelu", config
        )
    said = [(t.shape, t.dtype) for t in (y, hidden, dx, dhidden, dalphas)]
    assert said == [(t.shape, t.dtype) for t in launched]
    assert [launch.constants["BACKWARD"] for launch in launches] == [False, True]


def test_what_a_graph_will_compile_is_what_is_launched() -> None:
    x, down, up = example((40, 1024))
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in ("x", "down", "up", "alpha", "gate")]
    for node, value in zip(nodes, (x, down, up), strict=False):
        node.meta["example_value"] = value
    options = {"activation": "silu", "dim": -1}
    for config, save in ((0, True), (len(CONFIGS) + 2, True), (len(CONFIGS), False)):
        graph.call_function(torch.ops.esper.low_rank.default, tuple(nodes), {**options, "config": config, "save": save})
    alpha = x.new_empty((), dtype=torch.float32)
    with recording() as launches:
        _, hidden = kernels.forward(x, down, up, alpha, "silu", 2, save=True)
        kernels.backward(x, hidden, down, up, alpha, alpha, "silu", 2)
        kernels.forward(x, down, up, alpha, "silu", 0, save=False)
    kinds = [[str(arg.dtype)[6:] if isinstance(arg, Tensor) else arg for arg in launch.args] for launch in launches]
    for launched in kinds:
        launched[9] = 2  # the number of rows, on which nothing depends
    assert [launch.args for launch in hidden_launches(graph)] == kinds
    assert [launch.constants for launch in hidden_launches(graph)] == [launch.constants for launch in launches]


def test_without_a_gpu_the_operator_is_its_reference_in_these_configurations_too() -> None:
    x, down, up = torch.randn(4, 32), torch.randn(8, 32).t(), torch.randn(32, 8).t()
    alpha, gate = torch.tensor(0.5), torch.tensor(1.0)
    y, _ = low_rank(x.double(), down.double(), up.double(), alpha, gate, "relu", -1, CONFIG_COUNT - 1)
    torch.testing.assert_close(y, x.double() + 0.5 * torch.relu(x.double() @ down.double()) @ up.double())
