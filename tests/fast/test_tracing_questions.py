"""What a stand-in for a tensor would answer wrongly, or would be kept by, stays plain Python, and leaves nothing behind."""

from __future__ import annotations

import functools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import esper_fx
from esper_fx.passes.hazards import hazard
from esper_fx.passes.trace_report import How
from tests.support.networks import assert_same, run, twin


class Base(nn.Module):
    """A layer that returns a tensor or, told so, a tuple; and one behind it."""

    class Part(nn.Module):
        def __init__(self, wrap: bool) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.wrap = wrap

        def forward(self, x: Tensor) -> Any:
            y = self.inner(x) * (1 if self.training else 2)
            return (y, None) if self.wrap else y

    def __init__(self) -> None:
        super().__init__()
        self.part = self.Part(True)
        self.inner = nn.Linear(4, 4)


class IsInstance(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        return self.inner(y[0] if isinstance(y, tuple) else y)  # type: ignore[no-any-return]


class HasAttribute(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        return self.inner(y if hasattr(y, "shape") else y[0])  # type: ignore[no-any-return]


class Default(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * getattr(x, "scale", 2.0)  # type: ignore[no-any-return]


class InWords(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (2 if f"{x.dtype}" == "torch.float32" else 1)  # type: ignore[no-any-return]


class LooksUp(Base):
    factors: ClassVar = {torch.float32: 2.0, torch.float64: 3.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factors.get(x.dtype, 1.0)  # type: ignore[no-any-return]


class OfItems(Base):
    def forward(self, x: Tensor) -> Tensor:
        y, more = self.part(x)
        return self.inner(y if more is None else y + more)  # type: ignore[no-any-return]


class OfArguments(Base):
    """Called below with None by a forward that is Python."""

    def forward(self, x: Tensor, more: Tensor | None) -> Tensor:
        y = self.inner(x)
        return y if more is None else y + more  # type: ignore[no-any-return]


class OfTypes(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        return self.inner(y[0] if type(y) is tuple else y)  # type: ignore[no-any-return]


class OfIdentity(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (2 if x.dtype is torch.float32 else 1)  # type: ignore[no-any-return]


class IsTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        return self.inner(y if torch.is_tensor(y) else y[0])  # type: ignore[no-any-return]


class InProperty(Base):
    @property
    def factor(self) -> float:
        return 2.0 if self.training else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factor  # type: ignore[no-any-return]


class _Caller:
    def __init__(self, module: nn.Module) -> None:
        self.module = [module]

    def __call__(self, x: Tensor) -> Tensor:
        return x * 2 if self.module[0].training else x


class InAttribute(Base):
    def __init__(self) -> None:
        super().__init__()
        self.activation = functools.partial(_Caller(self))

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.inner(x))


class Tries(Base):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.inner(x) + x.unheard_of  # type: ignore[no-any-return, attr-defined]
        except AttributeError:
            return self.inner(x)  # type: ignore[no-any-return]


class Within(Base):
    def forward(self, x: Tensor) -> Tensor:
        with nn.utils.parametrize.cached():
            y = self.inner(x)
        return y * 2  # type: ignore[no-any-return]


class Says(Base):
    def forward(self, x: Tensor) -> Tensor:
        print("called")
        return self.inner(x)  # type: ignore[no-any-return]


_calls = 0


class CountsGlobally(Base):
    def forward(self, x: Tensor) -> Tensor:
        global _calls  # noqa: PLW0603
        _calls += 1
        return self.inner(x)  # type: ignore[no-any-return]


class Appends(Base):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.seen.append(y.detach())
        return y * len(self.seen)  # type: ignore[no-any-return]


class Registers(Base):
    def forward(self, x: Tensor) -> Tensor:
        if "scale" not in self._buffers:
            self.register_buffer("scale", torch.full((4,), 2.0))
        return self.inner(x) * self.get_buffer("scale")  # type: ignore[no-any-return]


class Remembers(Base):
    @functools.lru_cache(maxsize=8)  # noqa: B019
    def table(self) -> Tensor:
        return self.inner.weight.detach() * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.table()[0]  # type: ignore[no-any-return]


class Ordered(Base):
    def forward(self, x: Tensor) -> Any:
        return OrderedDict(y=self.inner(x))


class Tagged(list[Any]):
    """A list of a class of its own."""


class OwnList(Base):
    def forward(self, x: Tensor) -> Any:
        return Tagged([self.inner(x)])


@dataclass
class Doubles:
    """Changes what it is given."""

    y: Tensor
    twice: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.twice = self.y * 2
        self.y = self.y * 3


class OwnInit(Base):
    def forward(self, x: Tensor) -> Any:
        return Doubles(self.inner(x))


class CallsItself(Base):
    class Part(Base.Part):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)[0] * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.part(x))  # type: ignore[no-any-return]


IN_CODE = {
    OfItems: "asks whether 'more' is None",
    OfArguments: "asks whether 'more' is None",
    OfTypes: "asks for the type of 'y'",
    OfIdentity: "asks with 'is'",
    IsTensor: "asks whether a value is a Tensor",
    InProperty: "reads self.training",
    InAttribute: "reads self.training",
    Tries: "has a with or a try statement",
    Within: "has a with or a try statement",
    Says: "prints",
    CountsGlobally: "assigns to a global variable",
    Remembers: "remembers results",
}
WHILE_TRACING = {
    IsInstance: "forward asks of what class a value is",
    HasAttribute: "forward asks for attribute 'shape'",
    Default: "forward asks for attribute 'scale'",
    InWords: "forward asks for a value in words",
    LooksUp: "forward looks something up by a value",
    Appends: "changes attribute 'seen' of the model",
    Registers: "changes attribute '_buffers' of the model",
    Ordered: "makes a OrderedDict, whose class a graph would lose",
    OwnList: "makes a Tagged, whose class a graph would lose",
    OwnInit: "makes a Doubles, whose fields do not say how it was made",
    CallsItself: "Part has a __call__ of its own",
}
STATEFUL = (Appends, Registers)


class Around(nn.Module):
    """Hands on what its part returns, and None besides where that takes another argument."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Any:
        more = (None,) if isinstance(self.part, OfArguments) else ()
        return self.part(x, *more) if x.sum() < 1e9 else x


class Tensors(nn.Module):
    """Returns the tensors that a network returns in containers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        value = self.net(x)
        if isinstance(value, Doubles):
            return value.y, value.twice
        return tuple(value.values()) if isinstance(value, OrderedDict) else value


@pytest.mark.parametrize(("kind", "why"), IN_CODE.items())
def test_questions_are_seen_in_the_code(kind: type[nn.Module], why: str) -> None:
    assert why in str(hazard(kind()))


@pytest.mark.parametrize(("kind", "why"), {**IN_CODE, **WHILE_TRACING}.items())
def test_who_asks_stays_python_and_computes_as_before(kind: type[nn.Module], why: str) -> None:
    torch.manual_seed(0)
    net = Around(kind())
    model = esper_fx.morph(twin(net), sites="part.inner")
    report = {entry.name: entry for entry in model.trace_report()}
    assert report["part"].how is How.PYTHON
    assert why in report["part"].why
    x = torch.randn(3, 4).requires_grad_()
    for number in range(3):
        found = []
        for side in (net, model):
            torch.manual_seed(number)
            outputs, gradients = run(Tensors(side), x)
            found.append((outputs, {name: g for name, g in gradients.items() if ".esper." not in name}))
        assert_same(found[1][0], found[0][0])
        assert_same(found[1][1], found[0][1])
        net.train(number == 1), model.train(number == 1)


class Harmless(Base):
    """Asks about itself, about constants and about what may be left out."""

    limit = None

    def __init__(self) -> None:
        super().__init__()
        self.norm = None
        self.items = [1, 2]

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        norm = self.norm
        if norm is not None or self.limit is not None or not isinstance(self.inner, nn.Linear):
            return x
        found = {}
        for number in self.items:
            found[number] = self.inner(x)
        return found[1].reshape(x.shape[0], x.size(1))


def test_questions_about_the_module_are_harmless() -> None:
    net = Harmless()
    assert hazard(net) is None
    model = esper_fx.morph(net, sites="inner")
    assert model.trace_report()[0].how is How.TRACED


def test_a_stand_in_is_not_kept_by_what_the_forward_fills() -> None:
    net = Appends()
    model = esper_fx.morph(net, sites="inner")
    assert net.seen == []
    assert model.seen == []
    model(torch.ones(1, 4))
    assert not any(isinstance(value, fx.Proxy) for value in model.seen)
