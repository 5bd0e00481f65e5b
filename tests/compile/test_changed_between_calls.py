"""What changes between two calls without Dynamo's noticing: a body's tensors, memory that inputs share, hooks, backward."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper_fx
from esper_fx.lifecycle import Stage

pytestmark = pytest.mark.compile

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _apart() -> Iterator[None]:
    yield
    torch.compiler.reset()


def _grown() -> esper_fx.MorphableModel:
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = esper_fx.morph(net, sites=["0"], example_inputs=(X,))
    down, up = torch.randn(4, 8, generator=generator), torch.randn(8, 4, generator=generator)
    model.seeds["0"].germinate("low_rank", rank=4, weights={"down.weight": down, "up.weight": up})
    assert model.seeds["0"].stage is Stage.ACTIVE
    return model


def _gradients(model: esper_fx.MorphableModel, output: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    output.square().sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_a_body_that_is_frozen_and_trained_in_turn() -> None:
    model = _grown()
    fast = torch.compile(model, backend="esper")
    body = model.seeds["0"].body
    assert body is not None
    for trained in (False, True, False, True):
        body.requires_grad_(trained)
        for _ in range(2):
            mine, theirs = _gradients(model, fast(X)), _gradients(model, model(X))
            assert [name for name, g in mine.items() if g is None] == [name for name, g in theirs.items() if g is None]
            for name, gradient in theirs.items():
                if gradient is not None:
                    torch.testing.assert_close(mine[name], gradient, rtol=1e-5, atol=1e-5)
        assert model.settle(120)
    assert model.stats().plans == ("whole",)
    assert model.stats().recompiles == 0


def test_a_model_that_is_moved_to_another_dtype_under_autocast() -> None:
    model = _grown()
    fast = torch.compile(model, backend="esper")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(X), model(X))
        model.to(torch.bfloat16)
        torch.testing.assert_close(fast(X), model(X))


def test_a_body_alone_that_is_moved_to_another_dtype() -> None:
    model = _grown()
    fast = torch.compile(model, backend="esper")
    body = model.seeds["0"].body
    assert body is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fast(X)
        body.to(torch.bfloat16)
        torch.testing.assert_close(fast(X), model(X))


class _Adds(nn.Module):
    """Changes its first input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        hidden = self.linear(x)
        x.add_(1.0)
        return hidden + other * 2


def test_inputs_that_share_memory_which_is_changed(caplog: pytest.LogCaptureFixture) -> None:
    net = _Adds()
    model = esper_fx.morph(net, sites=["linear"])
    fast = torch.compile(model, backend="esper")
    with torch.no_grad():
        for shared in (True, False, True):
            mine, theirs = X.clone(), X.clone()
            out = fast(mine, mine[0] if shared else X[0])
            torch.testing.assert_close(out, net(theirs, theirs[0] if shared else X[0]))
            torch.testing.assert_close(mine, theirs)
    assert "shares memory" in caplog.text


def _until_ready(model: esper_fx.MorphableModel) -> None:
    """Wait until a change could be made live at the next step boundary."""
    deadline = time.monotonic() + 120
    while not model.growth.changes._boundary_work:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_checkpointing_around_a_compiled_model_that_grows() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = esper_fx.morph(net, sites=["1"], example_inputs=(X,))
    fast = torch.compile(model, backend="esper")

    def step(*, between: bool = False) -> None:
        x = X.clone().requires_grad_()
        output = checkpoint(fast, x, use_reentrant=False)
        if between:
            model.seeds["1"].germinate("low_rank", rank=2)
            _until_ready(model)
        assert isinstance(output, Tensor)
        output.sum().backward()

    step()
    step(between=True)
    clock = model.clock
    assert model.seeds["1"].stage is Stage.GERMINATING
    step()
    assert model.clock == clock + 1
    model.settle(120)
    step()
    assert model.seeds["1"].live
