"""Runs Gluon kernels without a GPU: Triton's interpreter does not take them, so here is what the language means, in PyTorch.

A kernel's Python code runs as it is, one program after the other; only the names that it uses mean something else: blocks are
tensors, shared memory is a tensor of NaN, layouts are nothing. Asynchronous copies do the worst that they may: from the moment
that one is asked for, its target is NaN, and what it brings is there only once it has been waited for. So a chunk that is read
too early, or overwritten while it is still wanted, spoils the result. What two warps do to each other is not seen: the barriers
between them are the compiler's.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esper_fx.kernels.launch import launch as real_launch


class Block(Tensor):
    """A block of values; arithmetic is PyTorch's, whose rules for dtypes are Triton's as far as kernels of ours go."""

    type = types.SimpleNamespace(layout=None)


def block(values: Tensor) -> Any:
    return values.as_subclass(Block)


class Pointer:
    """An address in the storage of a tensor, or a block of addresses."""

    def __init__(self, tensor: Tensor, offset: Any = None) -> None:
        self.tensor = tensor
        self.dtype = types.SimpleNamespace(element_ty=tensor.dtype)
        self.offset = torch.tensor(tensor.storage_offset()) if offset is None else offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + offset)

    def places(self, mask: Any, shape: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The storage, and offsets and mask of one shape; an offset outside of the tensor is an error."""
        storage = self.tensor.as_strided((self.tensor.untyped_storage().nbytes() // self.tensor.itemsize,), (1,), 0)
        wanted = torch.tensor(True) if mask is None else mask
        shapes = (self.offset.shape, wanted.shape) if shape is None else (self.offset.shape, wanted.shape, shape)
        size = torch.broadcast_shapes(*shapes)
        offset, wanted = (t.as_subclass(Tensor).expand(size) for t in (self.offset, wanted))
        first = self.tensor.storage_offset()
        last = first + sum((n - 1) * step for n, step in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        inside = (offset >= first) & (offset <= last) & bool(self.tensor.numel())
        assert bool((inside | ~wanted).all()), f"outside of a tensor {tuple(self.tensor.shape)}"
        return storage, torch.where(wanted, offset, first).to(torch.int64), wanted


class Shared:
    """A view of shared memory."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory

    @property
    def shape(self) -> list[int]:
        return list(self.memory.shape)

    def index(self, position: Any) -> Shared:
        assert 0 <= int(position) < len(self.memory), f"no part {int(position)} of {self.shape}"
        return Shared(self.memory[int(position)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.memory.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.memory.permute(*order))

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.memory.view(shape))

    def load(self, layout: Any = None) -> Any:
        return block(self.memory.clone())

    def store(self, values: Tensor) -> None:
        self.memory.copy_(values.as_subclass(Tensor))


class Program:
    """One program: what the language's functions mean to it."""

    def __init__(self, number: int, count: int) -> None:
        self.number, self.count = number, count
        self._groups: list[list[tuple[Shared, Tensor]]] = [[]]

    def language(self) -> dict[str, Any]:
        """The names that kernels know, and what they mean."""
        common = {
            "arange": lambda start, stop, layout=None: block(torch.arange(start, stop)),
            "cdiv": lambda a, b: -(-a // b),
            "erf": torch.erf,
            "exp": torch.exp,
            "where": lambda condition, a, b: torch.where(torch.as_tensor(condition), a, b),
            "zeros": lambda shape, dtype, layout=None: block(torch.zeros(shape, dtype=dtype)),
            "zeros_like": torch.zeros_like,
            "sum": torch.sum,
            "join": lambda a, b: torch.stack((a, b), -1),
            "convert_layout": lambda values, layout: values,
            "load": self._load,
            "store": self._store,
            "allocate_shared_memory": _allocate,
            "static_range": range,
            "program_id": lambda axis: self.number,
            "num_programs": lambda axis: self.count,
            **{name: getattr(torch, name) for name in ("float32", "int64", "bfloat16", "float16")},
        }
        layouts = ("BlockedLayout", "DotOperandLayout", "NVMMADistributedLayout", "SliceLayout", "SwizzledSharedLayout")
        language = types.SimpleNamespace(**common, **dict.fromkeys(layouts, _no_layout))
        copies = types.SimpleNamespace(commit_group=self._commit_group, wait_group=self._wait_group)
        return {
            "gl": language,
            "tl": language,
            "async_copy": copies,
            "async_load": self._async_load,
            "mma_v2": _mma,
        }

    def _load(self, pointer: Pointer, mask: Any = None, other: float = 0.0) -> Any:
        storage, offset, wanted = pointer.places(mask)
        return block(torch.where(wanted, storage[offset], torch.tensor(other, dtype=storage.dtype)))

    def _store(self, pointer: Pointer, values: Tensor, mask: Any = None) -> None:
        storage, offset, wanted = pointer.places(mask, values.shape)
        kept = values.as_subclass(Tensor).to(storage.dtype).expand(offset.shape)
        storage[offset[wanted]] = kept[wanted]

    def _async_load(self, target: Shared, pointer: Pointer, mask: Any = None) -> None:
        values = self._load(pointer, mask)
        assert list(values.shape) == target.shape
        target.memory.fill_(float("nan"))
        self._groups[-1].append((target, values))

    def _commit_group(self) -> None:
        self._groups.append([])

    def _wait_group(self, pending: int) -> None:
        """All but the latest ``pending`` groups arrive; what is not committed yet does not count."""
        while len(self._groups) - 1 > pending:
            for target, values in self._groups.pop(0):
                target.store(values)


def _no_layout(*_: Any) -> None:
    return None


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
    return Shared(torch.full(shape, float("nan"), dtype=dtype))


def _mma(a: Tensor, b: Tensor, accumulator: Tensor) -> Tensor:
    assert a.dtype == b.dtype
    assert a.shape[-1] % 16 == 0, "a matrix instruction takes 16 at a time"
    return accumulator + a.float() @ b.float()


def _meaning(code: Any, language: dict[str, Any], known: dict[Any, Any]) -> Any:
    """A kernel's Python function, or that of one that it calls, in which names mean what ``language`` says."""
    if code not in known:
        names = dict(code.__globals__)
        known[code] = types.FunctionType(code.__code__, names, code.__name__, code.__defaults__)
        for name in code.__code__.co_names:
            if name in language:
                names[name] = language[name]
            elif hasattr(names.get(name), "fn"):
                names[name] = _meaning(names[name].fn, language, known)
    return known[code]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """:func:`esper_fx.kernels.launch.launch`, which runs a Gluon kernel here where its tensors are on the CPU."""
    if any(isinstance(arg, Tensor) and arg.device.type != "cpu" for arg in args):
        real_launch(kernel, grid, *args, **constants)
        return
    (count,) = grid
    values = [Pointer(arg) if isinstance(arg, Tensor) else arg for arg in args]
    options = {name: value for name, value in constants.items() if name not in ("num_warps", "traceable")}
    for number in range(count):
        _meaning(kernel.fn, Program(number, count).language(), {})(*values, **options)
