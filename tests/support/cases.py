"""Small networks of several kinds, each of which morphing treats in another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import models


def small_transformer() -> models.Example:
    return models.transformer(vocabulary=16, width=8, depth=2, heads=2, tokens=6, batch=2)


def small_cnn() -> models.Example:
    return models.residual_cnn(channels=(4,), blocks_per_stage=2, size=6, batch=3)


class Branching(nn.Module):
    """Its own forward cannot be traced; its children can."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if y.sum() > 0 else self.second(-y) * 2


class ReadsTraining(nn.Module):
    """What it computes depends on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.training else self.layer(x) * 3


class Around(nn.Module):
    """A part that reads the mode, a plain one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ReadsTraining()
        self.after = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.embed.weight
        self.again = self.embed

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(self.embed(x))))


class Keywords(nn.Module):
    """Keyword arguments, defaults, a dictionary out, a method and attributes of its own."""

    greeting = "hello"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = 2.0

    def forward(self, x: Tensor, *, shift: Tensor | None = None, factor: float = 1.0) -> dict[str, Tensor]:
        y = self.layer(x) * self.scale * factor
        return {"y": y if shift is None else y + shift, "x": x}

    def double(self) -> Any:  # shadows nn.Module.double, as user code does
        return "mine"


class PassesThrough(nn.Module):
    """A part of it hands its input on, and that part is a site."""

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    def __init__(self) -> None:
        super().__init__()
        self.nothing = self.Nothing()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.layer(self.nothing(x)) + x


def vectors() -> tuple[Tensor, ...]:
    return (torch.randn(3, 4, requires_grad=True),)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], Any]] = {
    "transformer": (lambda: small_transformer().model, lambda: small_transformer().inputs, "blocks.**"),
    "cnn": (lambda: small_cnn().model, lambda: small_cnn().inputs, ["blocks.*", "blocks.*.norm1", "stem"]),
    "sequential": (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(True), nn.Linear(4, 2)), vectors, "*"),
    "nested sequential": (lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Tanh()), vectors, "**"),
    "by type": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), vectors, nn.Linear),
    "by node": (Tied, vectors, lambda node: node.target is torch.tanh),
    "python root": (Branching, vectors, ["first.*", "second"]),
    "reads training": (ReadsTraining, vectors, "layer"),
    "child reads training": (Around, vectors, ["inner", "after"]),
    "tied": (Tied, vectors, ["embed", "head"]),
    "passes through": (PassesThrough, vectors, ["nothing", "layer"]),
}
