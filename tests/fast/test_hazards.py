"""Code that tracing would freeze or lose stays plain Python, and behaves as before to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper_fx
from esper_fx.passes.hazards import hazard
from esper_fx.passes.trace_report import How
from tests.support.networks import assert_same, run, twin


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)


class ReadsTraining(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2 if self.training else self.inner(x)


class WithoutGradients(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.inner(x)
        return x * scale


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Recomputes(Base):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


class Doubled(torch.autograd.Function):
    """The identity whose gradient is doubled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * 2


def doubled(x: Tensor) -> Tensor:
    result: Tensor = Doubled.apply(x)  # type: ignore[no-untyped-call]
    return result


class OwnGradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        return doubled(self.inner(x))


class Counts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) * self.calls


class AsksForTensor(Base):
    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        return self.inner(x if isinstance(x, Tensor) else x[0])


class Gambles(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if random.random() < 0.5 else x


class ThroughMethod(Base):
    def helper(self, x: Tensor) -> Tensor:
        return x if self.training else -x

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(self.inner(x))


class MakesConstants(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + torch.rand(4)


class OptionalArgument(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.inner(x)
        if mask is not None:
            x = x * mask
        return x


class Straight(Base):
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(self.inner(x), self.inner.weight, bias)


SEEN_IN_CODE = [
    (ReadsTraining, "self.training"),
    (WithoutGradients, "gradients off"),
    (Decorated, "decorated"),
    (Recomputes, "torch.utils.checkpoint"),
    (OwnGradient, "custom autograd function"),
    (Counts, "assigns to an attribute"),
    (AsksForTensor, "is a Tensor"),
    (Gambles, "random numbers"),
    (ThroughMethod, "self.training"),
]
SEEN_WHILE_TRACING = [(MakesConstants, "tensor of constants"), (OptionalArgument, "mask is None")]


@pytest.mark.parametrize(("kind", "why"), SEEN_IN_CODE)
def test_what_tracing_would_misread_is_seen_in_the_code(kind: type[nn.Module], why: str) -> None:
    assert why in str(hazard(kind()))


@pytest.mark.parametrize("module", [nn.Linear(4, 4), nn.ReLU(), Straight()])
def test_harmless_code_is_traced(module: nn.Module) -> None:
    assert hazard(module) is None
    model = esper_fx.morph(nn.Sequential(module), sites="0")
    assert model.trace_report()[0].how is How.TRACED


class Net(nn.Module):
    """A part between two layers, called by plain Python, so that the part is a scope of its own."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.part = part
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(self.first(x) if x.sum() > 0 else x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [kind for kind, _ in (*SEEN_IN_CODE, *SEEN_WHILE_TRACING)])
@pytest.mark.parametrize("around", [Net, nn.Sequential])
def test_with_a_seed_after_it_it_behaves_as_before(
    kind: type[nn.Module], around: Callable[[nn.Module], nn.Module]
) -> None:
    torch.manual_seed(0)
    net = around(kind())
    site = "part" if around is Net else "0"
    model = esper_fx.morph(twin(net), sites=[site, f"{site}.inner"])
    assert set(model.seeds) == {site, f"{site}.inner"}
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for step in range(3):
        found = []
        for side in (net, model):
            torch.manual_seed(step)
            random.seed(step)
            outputs, gradients = run(side, x)
            found.append((outputs, {name: g for name, g in gradients.items() if not name.startswith("esper.")}))
        assert_same(found[1][0], found[0][0])
        assert_same(found[1][1], found[0][1])
        net.train(step == 1)
        model.train(step == 1)


@pytest.mark.parametrize(("kind", "why"), SEEN_WHILE_TRACING)
def test_why_it_was_not_traced_is_reported(kind: type[nn.Module], why: str) -> None:
    model = esper_fx.morph(Net(kind()), sites="part")
    report = {entry.name: entry for entry in model.trace_report()}
    assert report["part"].how is How.PYTHON
    assert why in report["part"].why


def test_an_optional_argument_may_be_there_or_not() -> None:
    part = OptionalArgument()
    model = esper_fx.morph(part, sites="inner")
    x, mask = torch.randn(2, 4), torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert torch.equal(model(x), part(x))
    assert torch.equal(model(x, mask), part(x, mask))
    assert torch.equal(model(x, mask=mask), part(x, mask=mask))


def test_the_seed_of_a_module_that_stays_python_grows_and_goes() -> None:
    net = Net(ReadsTraining())
    x = torch.randn(3, 4)
    model = esper_fx.morph(net, sites="part", example_inputs=(x,))
    seed = model.seeds["part"]
    assert seed.site.shape == (3, 4)
    seed.germinate("affine", weights={"scale": torch.zeros(4), "shift": torch.ones(4)})
    expected = net.last(net.part(net.first(x) if x.sum() > 0 else x) + 1)
    assert torch.allclose(model(x), expected)
    seed.prune()
    assert torch.equal(model(x), net(x))
