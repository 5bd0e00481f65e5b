"""Symbolic integers: sizes that a fake tensor has without their being fixed, and what was taken for granted of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.printers import PythonPrinter

SymbolicNumber = torch.SymInt | torch.SymFloat | torch.SymBool


def fake_mode(*, symbolic: bool, beside_real: bool = True) -> FakeTensorMode:
    """A mode for fake tensors.

    Args:
        symbolic: Whether their sizes need not be fixed.
        beside_real: Whether operations may take real ones as well.
    """
    return FakeTensorMode(allow_non_fake_inputs=beside_real, shape_env=ShapeEnv() if symbolic else None)


@contextlib.contextmanager
def with_symbols(mode: FakeTensorMode) -> Iterator[None]:
    """A mode with symbolic sizes, with the functions for them that are written in Python."""
    with enable_python_dispatcher(), mode:
        yield


def new_size(mode: FakeTensorMode, name: str, example: int) -> torch.SymInt:
    """A symbolic integer of 2 or more.

    Args:
        mode: A symbolic one.
        name: Equal names give equal symbols.
        example: What it is for now: where PyTorch has to know more of it, this decides, and :func:`guards` tells.
    """
    sizes, source = mode.shape_env, ConstantSource(name)
    assert sizes is not None
    symbol = sizes.create_symbol(example, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    size = sizes.create_symintnode(symbol, hint=example, source=source)
    assert isinstance(size, torch.SymInt)
    return size


def symbolic_text(value: SymbolicNumber) -> tuple[str, dict[str, int]]:
    """A symbolic number as Python, and the names in it with what each is for now; none where it is fixed after all."""
    expression = value.node.expr
    values = value.node.shape_env.backed_var_to_val if expression.free_symbols else {}
    return _printed(expression), {str(symbol): int(values[symbol]) for symbol in expression.free_symbols}


def symbol(size: torch.SymInt) -> str:
    """The name that :func:`symbolic_text` and :func:`guards` have for what :func:`new_size` has made."""
    return str(size.node._expr)


def guards(mode: FakeTensorMode) -> tuple[str, ...]:
    """What was taken for granted of symbolic integers under a mode, as Python over their names."""
    return tuple(_printed(guard.expr) for guard in mode.shape_env.guards) if mode.shape_env is not None else ()


def _printed(expression: object) -> str:
    return str(PythonPrinter().doprint(expression))
