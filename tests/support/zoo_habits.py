"""Models that go about their parts as people's code does: as lists, past their parents, under odd names, in wrappers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.support.zoo_structures import chain


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x))


class AsList(nn.Module):
    """Goes through a Sequential item by item; stays Python."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if x.sum() < 1e9 else x
        return self.last(x)  # type: ignore[no-any-return]


class Backbone(nn.Module):
    """Two blocks, that others call one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Block()
        self.body = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))  # type: ignore[no-any-return]


class Past(nn.Module):
    """Calls the parts of its part, and then the part itself; stays Python."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.backbone.stem(x) if x.sum() < 1e9 else x
        return self.last(self.backbone.body(y) + self.backbone(x))  # type: ignore[no-any-return]


class ByName(Past):
    """The same, in a way that its code does not tell."""

    def forward(self, x: Tensor) -> Tensor:
        parts = dict(self.backbone.named_children())
        y = parts["stem"](x) if x.sum() < 1e9 else x
        return self.last(parts["body"](y))  # type: ignore[no-any-return]


class Sliced(nn.Module):
    """Calls a slice of a Sequential, and the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1:](x) + self.blocks(x)  # type: ignore[no-any-return]


class Stages(nn.Sequential):
    """A Sequential with a forward of its own, that goes through itself; stays Python."""

    def __init__(self) -> None:
        super().__init__(Block(), Block(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Any:
        collected = []
        for stage in self:
            x = stage(x) * (1.0 if self.training else 0.5)
            collected.append(x)
        assert len(collected) == len(self)
        return [*collected, self[-1](x)]


class Features(nn.ModuleDict):
    """A ModuleDict that returns what all its items return, as backbones of detectors do."""

    def __init__(self) -> None:
        super().__init__({"stem": Block(), "body": Block()})

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        found = OrderedDict()
        for name, module in self.items():
            x = module(x)
            found[name] = x
        return found


class Children(nn.Module):
    """Goes through all its parts and buffers, and counts its calls in an attribute; stays Python."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.second = Block()
        self.register_buffer("ones", torch.ones(4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for module in self.children():
            x = module(x)
        for module in self._modules.values():
            x = module(x) if module is not None else x
        return x * len(list(self.children())) + sum(buffer.sum() for buffer in self.buffers())


class Words(nn.Module):
    """Has parts whose names mean something in Python's code, and a module called ``self``."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("class", "self", "not"):
            self.add_module(name, Block())

    def forward(self, x: Tensor) -> Tensor:
        for name in ("class", "self", "not"):
            x = self.get_submodule(name)(x)
        return x


class Selves(nn.Module):
    """Calls a part named ``self``, as BERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.self = nn.Linear(4, 4)
        self.output = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.tanh(self.self(x)))  # type: ignore[no-any-return]


class Wrapper(nn.Module):
    """Looks up in what it wraps whatever it has not itself."""

    def __init__(self) -> None:
        super().__init__()
        self.wrapped = Backbone()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.wrapped(*args, **kwargs)  # type: ignore[no-any-return]


class OwnCall(Block):
    """Does something after its forward, in a ``__call__`` of its own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 2


def _doubled(self: Block, x: Tensor) -> Tensor:
    return Block.forward(self, x) * 2


def replaced_forward() -> nn.Module:
    """A block whose forward is an attribute, put there later, as libraries that change models do."""
    block = Block()
    block.forward = MethodType(_doubled, block)  # type: ignore[method-assign]
    return chain(block)


def pruned() -> nn.Module:
    """A layer whose weight is computed anew before every call."""
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call]
    return chain(layer)


class NoneAtTimes(nn.Module):
    """A part that returns nothing in evaluation mode, which its parent asks about."""

    class Part(Block):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) if self.training else None

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.part = self.Part()
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.part(x)
        return self.last(x if y is None else y)  # type: ignore[no-any-return]


class Vectorized(nn.Module):
    """Calls its parts within torch.vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        each: Callable[[Tensor], Tensor] = torch.vmap(lambda row: self.last(torch.tanh(self.first(row))))
        return each(x)
