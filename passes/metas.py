"""What compilation reads of a region's inputs: of tensors, and of sizes that vary from call to call.

Such a size is an expression over named integers, written as Python. One text serves three ends: of ints it makes the size in
a call, of PyTorch's symbolic integers that of a fake tensor, and of fx proxies the nodes that compute it in a graph.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from esper_fx import _torch

_NAME = re.compile(r"\b[A-Za-z_]\w*\b")
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Size:
    """A size that is not fixed, or another number that follows from sizes.

    Attributes:
        text: Python over names of integers.
        names: These, in the order in which they stand there first, each with an example.
    """

    text: str
    names: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, number: Any) -> Any:
        """Read it off a number that fake tensors have led to; a plain number where it is fixed."""
        if type(number) is int or not isinstance(number, torch.SymInt | torch.SymFloat | torch.SymBool):
            return number
        text, examples = _torch.symbolic_text(number)
        if not examples:
            return evaluate(text, _NOTHING)
        return cls(text, tuple((n, examples[n]) for n in dict.fromkeys(_NAME.findall(text)) if n in examples))

    @property
    def example(self) -> Any:
        """What it is where its names are what they were when it was read."""
        return evaluate(self.text, dict(self.names))

    def renamed(self, names: Mapping[str, str]) -> Size:
        """The same with other names."""
        return Size(renamed(self.text, names), tuple((names.get(name, name), example) for name, example in self.names))


Dim = int | Size


def renamed(text: str, names: Mapping[str, str]) -> str:
    """An expression with other names."""
    return _NAME.sub(lambda found: names.get(found[0], found[0]), text)


def evaluate(text: str, names: Mapping[str, Any]) -> Any:
    """What an expression is for these values of its names: ints, symbolic integers or proxies."""
    return eval(_code(text), {"math": math, "torch": torch}, names)


@lru_cache(4096)
def _code(text: str) -> types.CodeType:
    return compile(text, "<size>", "eval")


def sizes(dims: Sequence[Dim], names: Mapping[str, Any]) -> tuple[Any, ...]:
    """What dimensions are for these values of their names."""
    return tuple(evaluate(dim.text, names) if isinstance(dim, Size) else dim for dim in dims)


def examples(dims: Sequence[Dim]) -> tuple[int, ...]:
    """What dimensions are where their names are what they were when they were read."""
    return tuple(dim.example if isinstance(dim, Size) else dim for dim in dims)


@dataclass(frozen=True)
class TensorMeta:
    """What compilation reads of a tensor: shape, stride, dtype, device and whether it needs a gradient."""

    shape: tuple[Dim, ...]
    stride: tuple[Dim, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor, requires_grad: bool | None = None) -> TensorMeta:
        """Read it off a tensor, real or fake."""
        grad = tensor.requires_grad if requires_grad is None else requires_grad
        shape, stride = tuple(map(Size.of, tensor.shape)), tuple(map(Size.of, tensor.stride()))
        return cls(shape, stride, tensor.dtype, tensor.device, grad)

    def empty(self, names: Mapping[str, Any] = _NOTHING) -> Tensor:
        """A new tensor of this kind with undefined values; under a fake mode it is fake.

        Args:
            names: What the names of its sizes are.
        """
        shape, stride = sizes(self.shape, names), sizes(self.stride, names)
        tensor = torch.empty_strided(shape, stride, dtype=self.dtype, device=self.device)
        return tensor.requires_grad_(self.requires_grad)

    def fixed(self, names: Mapping[str, int] | None = None) -> TensorMeta:
        """The same, with sizes for these values of their names. Default: as they were when they were read."""
        values = self.names if names is None else names
        return replace(self, shape=sizes(self.shape, values), stride=sizes(self.stride, values))

    def with_grad(self, requires_grad: bool) -> TensorMeta:
        """The same, but that it needs a gradient or not."""
        return TensorMeta(self.shape, self.stride, self.dtype, self.device, requires_grad)

    @property
    def names(self) -> dict[str, int]:
        """The names of its sizes, in the order in which they stand there first, each with an example."""
        return {
            name: example for dim in (*self.shape, *self.stride) if isinstance(dim, Size) for name, example in dim.names
        }

    def renamed(self, names: Mapping[str, str]) -> TensorMeta:
        """The same with other names for sizes."""
        if not names:
            return self
        shape, stride = (
            tuple(dim.renamed(names) if isinstance(dim, Size) else dim for dim in dims)
            for dims in (self.shape, self.stride)
        )
        return replace(self, shape=shape, stride=stride)

    def describe(self) -> list[Any]:
        """A JSON value, for keys."""
        shape, stride = (
            [[dim.text, *map(list, dim.names)] if isinstance(dim, Size) else dim for dim in dims]
            for dims in (self.shape, self.stride)
        )
        return [shape, stride, str(self.dtype), str(self.device), self.requires_grad]


@dataclass(frozen=True)
class SizeMeta:
    """An integer input that sizes of the other inputs are made of.

    Attributes:
        name: What these call it.
        example: What it is in the call that is compiled for.
    """

    name: str
    example: int

    def with_grad(self, requires_grad: bool) -> SizeMeta:
        """Itself: it needs none."""
        return self

    def describe(self) -> list[Any]:
        """A JSON value, for keys."""
        return ["size", self.name, self.example]


InputMeta = TensorMeta | SizeMeta


def fixed(inputs: Sequence[InputMeta]) -> tuple[TensorMeta | int, ...]:
    """The same inputs, of the sizes that they are examples of."""
    return tuple(
        meta.example if isinstance(meta, SizeMeta) else meta.fixed() if meta.names else meta for meta in inputs
    )


class Symbols:
    """Symbolic integers of some names, and a fake mode in which tensors have sizes made of them.

    Args:
        names: Names, each with an example of 2 or more. None: it is a mode for fixed sizes.
        beside_real: Whether operations may take real tensors as well.

    Attributes:
        mode: The fake mode.
        given: For each name the symbolic integer.
    """

    def __init__(self, names: Mapping[str, int], *, beside_real: bool = True) -> None:
        self.mode = _torch.fake_mode(symbolic=bool(names), beside_real=beside_real)
        self.given = {name: _torch.new_size(self.mode, name, example) for name, example in names.items()}

    @classmethod
    def of(cls, inputs: Sequence[InputMeta | int]) -> Symbols:
        """Those that inputs are made of."""
        return cls({meta.name: meta.example for meta in inputs if isinstance(meta, SizeMeta)})

    def active(self) -> AbstractContextManager[object]:
        """The fake mode, and where there are names what lets every function of PyTorch take symbolic integers."""
        return _torch.with_symbols(self.mode) if self.given else self.mode

    def examples(self, inputs: Sequence[InputMeta | int]) -> list[Any]:
        """One of each of these inputs; call it while they are active."""
        return [
            meta
            if isinstance(meta, int)
            else self.given[meta.name]
            if isinstance(meta, SizeMeta)
            else meta.empty(self.given)
            for meta in inputs
        ]

    @property
    def names(self) -> dict[str, str]:
        """What PyTorch calls the symbolic integers, and their names here."""
        return {_torch.symbol(size): name for name, size in self.given.items()}

    def guards(self) -> tuple[str, ...]:
        """What has been taken for granted of the names, besides that they are 2 or more; expressions that have to be true."""
        names = self.names
        return tuple(renamed(text, names) for text in _torch.guards(self.mode))
