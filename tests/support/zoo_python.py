"""Models whose forwards do what Python can: many results, control flow, any arguments, gradients of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.support.zoo_structures import chain


class Several(NamedTuple):
    """What `Splits` returns."""

    first: Tensor
    second: Tensor


class Splits(nn.Module):
    """Returns two values, in a container of some kind; stays Python where it may not be traced."""

    def __init__(self, kind: type, traced: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.kind = kind
        self.traced = traced

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        if not self.traced and y.sum() > 1e9:
            y = -y
        return self.kind(y, y * x) if hasattr(self.kind, "_fields") else self.kind((y, y * x))


class Joins(nn.Module):
    """Puts together what its part returns."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.part(x)
        return self.last(first) + second  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """An LSTM, which returns a tuple with a tuple inside."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x_TBD: Tensor) -> Tensor:
        y_TBD, (hidden, _) = self.lstm(x_TBD)
        return self.last(y_TBD + hidden[-1])  # type: ignore[no-any-return]


class Depends(nn.Module):
    """What it calls depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.one = chain(nn.Tanh())
        self.other = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        while x.abs().sum() < 20:
            x = x * 2
        return self.other(x)  # type: ignore[no-any-return]


class Keywords(nn.Module):
    """Takes any keyword arguments and hands them on; returns a dictionary with a list inside."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, **options: Any) -> Tensor:
            return self.layer(x) * options.get("factor", 1.0) + options["shift"]  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.part = self.Part()
        self.last = nn.Linear(4, 4)

    def forward(self, *args: Tensor, **kwargs: Any) -> dict[str, Any]:
        y = self.part(*args, **kwargs)
        return {"y": self.last(y), "all": [y, *args]}


@dataclass
class Answer:
    """What `Answers` returns."""

    y: Tensor
    extra: dict[str, Tensor]


class Answers(nn.Module):
    """Returns a dataclass; so does its part."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Answer:
            y = self.layer(x)
            return Answer(y, {"x": x})

    def __init__(self) -> None:
        super().__init__()
        self.part = self.Part()
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Answer:
        found = self.part(x)
        return Answer(self.last(found.y + found.extra["x"]), {"first": found.y})


class _Clipped(torch.autograd.Function):
    """The identity, whose gradient is clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].clamp(-0.01, 0.01)


class OwnGradient(nn.Module):
    """Calls an autograd function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return _Clipped.apply(self.inner(x))  # type: ignore[no-untyped-call, no-any-return]


class OwnFunction(nn.Module):
    """Calls an autograd function that it has been given, by no name that tells."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.function = _Clipped.apply

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))  # type: ignore[no-untyped-call, no-any-return]


clipped = _Clipped.apply


class BorrowedFunction(nn.Module):
    """Calls an autograd function by the name that its file has given it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return clipped(self.inner(x))  # type: ignore[no-untyped-call, no-any-return]
