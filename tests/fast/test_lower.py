"""Lowering finds the bodies that fused operators compute, and keeps values, gradients and everything around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from esper_fx.ops import seed_output
from esper_fx.ops.probe import site_values
from esper_fx.passes.lower import Candidate, candidates, lower
from tests.support.variants import grown, region_of, run

TOKENS, MAP, SEQUENCE = (2, 5, 16), (2, 16, 4, 3), (2, 16, 7)

FUSED: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    *[
        ("low_rank", shape, {"rank": 4, "activation": a})
        for shape in (TOKENS, MAP)
        for a in (None, "relu", "gelu", "silu")
    ],
    ("low_rank", TOKENS, {"rank": 64}),
    ("low_rank", TOKENS, {"rank": 4, "scale": 2.5}),
    ("channel_gate", MAP, {}),
    ("depthwise_conv", MAP, {}),
    ("depthwise_conv", MAP, {"kernel_size": 5}),
]
LEFT: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("low_rank", TOKENS, {"rank": 65}),
    ("low_rank", TOKENS, {"rank": 4, "dropout": 0.5}),
    ("bottleneck", TOKENS, {}),
    ("bottleneck", MAP, {}),
    ("channel_gate", TOKENS, {}),
    ("conv", MAP, {}),
    ("affine", TOKENS, {}),
    ("gated_mlp", TOKENS, {}),
]


def always(candidate: Candidate) -> int | None:
    return 0


def targets(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(("name", "shape", "config"), FUSED)
@pytest.mark.parametrize(("alpha", "gate"), [(0.5, 1.0), (1.0, 0.25), (0.0, 1.0), (1.0, 0.0)])
def test_the_fused_operator_computes_what_the_functions_did(
    name: str, shape: tuple[int, ...], config: dict[str, Any], alpha: float, gate: float
) -> None:
    body = grown(name, shape, torch.float64, **config).double()
    module = region_of(body, shape, torch.float64)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = run(module, body, x, alpha, gate)
    assert lower(module.graph, choose=always)
    module.recompile()
    assert f"esper.{name}.default" in targets(module)
    assert not any("seed_" in target for target in targets(module))
    for actual, wanted in zip(run(module, body, x, alpha, gate), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "shape", "config"), LEFT)
def test_other_bodies_are_left_to_inductor(name: str, shape: tuple[int, ...], config: dict[str, Any]) -> None:
    module = region_of(grown(name, shape, **config), shape)
    before = module.graph.python_code("self").src
    assert not lower(module.graph, choose=always)
    assert module.graph.python_code("self").src == before


@pytest.mark.parametrize(("name", "shape", "config"), FUSED)
def test_what_is_not_chosen_stays_as_it_is(name: str, shape: tuple[int, ...], config: dict[str, Any]) -> None:
    module = region_of(grown(name, shape, **config), shape)
    before = module.graph.python_code("self").src
    asked: list[Candidate] = []
    assert not lower(module.graph, choose=asked.append)  # type: ignore[arg-type]
    assert [candidate.operator for candidate in asked] == [name]
    assert module.graph.python_code("self").src == before


class Written(nn.Module):
    """A body that a user has written, with whatever is asked for."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.down, self.up = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(16, 4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.linear(x, self.down)
        if self.what == "tanh-gelu":
            hidden = functional.gelu(hidden, approximate="tanh")
        if self.what == "counts":
            self.calls.add_(1)
        delta = functional.linear(hidden, self.up)
        if self.what == "reads hidden twice":
            delta = delta + functional.linear(hidden, self.up)
        return delta


def test_a_body_of_ones_own_that_is_written_the_same_way_is_found() -> None:
    assert [c.operator for c in candidates(region_of(Written("plain"), TOKENS).graph)] == ["low_rank"]


@pytest.mark.parametrize("what", ["tanh-gelu", "reads hidden twice"])
def test_a_body_that_computes_something_else_is_not(what: str) -> None:
    assert candidates(region_of(Written(what), TOKENS).graph) == []


def test_what_a_body_does_to_its_buffers_stays() -> None:
    module = region_of(Written("counts"), TOKENS)
    assert lower(module.graph, choose=always)
    assert "add_" in [node.target for node in module.graph.nodes]


def test_weights_are_cast_under_autocast() -> None:
    """The value is float32, as of a residual stream; what autocast would do to the products is done to the weights."""
    body = grown("low_rank", TOKENS, rank=4, activation="gelu")
    x = torch.randn(TOKENS, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        module = region_of(body, TOKENS)
        expected = run(module, body, x, 0.5, 1.0)
        (candidate,) = candidates(module.graph, autocast=torch.bfloat16)
        assert candidate.dtype == torch.bfloat16
        lower(module.graph, choose=always, autocast=torch.bfloat16)
        module.recompile()
        actual = run(module, body, x, 0.5, 1.0)
    for got, wanted in zip(actual, expected, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=3e-2, atol=3e-2)


def test_candidates_that_the_same_code_serves_are_described_alike() -> None:
    def described(shape: tuple[int, ...], **config: Any) -> list[Any]:
        (candidate,) = candidates(region_of(grown("low_rank", shape, **config), shape).graph)
        return candidate.describe()

    first = described(TOKENS, rank=4)
    assert described(TOKENS, rank=4) == first
    assert described(TOKENS, rank=8) != first
    assert described((2, 6, 16), rank=4) != first
    assert described(TOKENS, rank=4, activation="relu") != first


def test_new_nodes_say_where_they_come_from() -> None:
    module = region_of(grown("low_rank", TOKENS, rank=4), TOKENS)
    (candidate,) = candidates(module.graph)
    candidate.output.meta["stack_trace"] = "model.py, line 1"
    lower(module.graph, choose=always)
    made = [node for node in module.graph.nodes if "example_value" not in node.meta]
    assert len(made) == 4
    assert all(node.meta["stack_trace"] == "model.py, line 1" for node in made)


@pytest.mark.parametrize(("name", "shape", "config"), [FUSED[0], FUSED[-2], FUSED[-1]])
def test_a_site_with_probes_is_fused_too(name: str, shape: tuple[int, ...], config: dict[str, Any]) -> None:
    module = region_of(grown(name, shape, **config), shape)
    graph = module.graph
    (seed,) = [node for node in graph.nodes if node.target is seed_output]
    with graph.inserting_after(seed):
        graph.call_function(site_values, (seed.args[0], seed))
    assert lower(graph, choose=always)
    assert [node.target for node in graph.nodes if node.target is seed_output] == []
    (probe,) = [node for node in graph.nodes if node.target is site_values]
    assert probe.args[1] is not seed
