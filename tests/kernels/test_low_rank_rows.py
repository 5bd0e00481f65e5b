"""What can be said without a GPU of the kernel that keeps rows on the chip: what it takes, and what it will compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from esper_fx.kernels import low_rank_rows as kernels
from esper_fx.kernels.launch import recording
from esper_fx.kernels.low_rank import CONFIG_COUNT, CONFIGS
from esper_fx.ops.low_rank import hidden_launches, low_rank


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
    with pytest.raises(ValueError, match="config=4: expected 0 to 3"):
        kernels.check(*example(), -1, 4)


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
