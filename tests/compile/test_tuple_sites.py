"""A site whose module returns a tuple, in a model that only ever ran compiled."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import esper_fx


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Two(NamedTuple):
    first: Tensor
    second: Tensor


class Part(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x) * (2 if self.training else 1)
        return self.kind(y, x) if self.kind is Two else self.kind((y, x))


class Net(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.part = Part(kind)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.part(x)
        return self.last(first) + second  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [tuple, list, Two])
@pytest.mark.parametrize("backend", ["esper", "eager"])
def test_it_grows_and_becomes_plain(kind: Any, backend: str) -> None:
    x = torch.randn(3, 4)
    model = esper_fx.morph(Net(kind), sites="part")
    fast = torch.compile(model, backend=backend)
    fast(x)
    assert model.seeds["part"].container is kind
    if backend == "eager":
        model(x)
    weights = {"scale": torch.zeros(4), "shift": torch.ones(4)}
    model.seeds["part"].germinate("affine", weights=weights).wait(300)
    grown = fast(x)
    torch.testing.assert_close(grown, model(x))
    torch.testing.assert_close(esper_fx.unmorph(model)(x), grown)
    assert model.stats().recompiles == 0
