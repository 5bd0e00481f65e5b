"""Addresses of the functions in a graph: names that every process resolves to the same object."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch

from esper_fx._torch import FUNCTION_HOLDERS, HigherOrderOperator, OpOverload, OpOverloadPacket


def address(function: Any) -> str | None:
    """A dotted path under which any process finds this very object, or None if there is none."""
    if isinstance(function, OpOverload):
        namespace, _, name = function._schema.name.partition("::")
        return f"torch.ops.{namespace}.{name}.{function._overloadname}"
    if isinstance(function, OpOverloadPacket):
        namespace, _, name = function._qualified_op_name.partition("::")
        return f"torch.ops.{namespace}.{name}"
    if isinstance(function, HigherOrderOperator):
        return f"torch.ops.higher_order.{function.name()}"
    for name in ("__qualname__", "__name__"):  # functions of PyTorch's C++ have the second only
        own = f"{getattr(function, '__module__', None)}.{getattr(function, name, '')}"
        if _finds(own, function):
            return own
    return _well_known().get(id(function))


def resolve(path: str) -> Any:
    """The object at an address.

    Raises:
        AttributeError: There is none.
    """
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            value = getattr(value, part)
        return value
    raise AttributeError(f"nothing is at {path!r}")


@cache
def tensor_methods() -> dict[int, str]:
    """Names of the methods of torch.Tensor by the identity of the function."""
    return {id(getattr(torch.Tensor, name)): name for name in sorted(dir(torch.Tensor), reverse=True)}


def _finds(path: str, function: Any) -> bool:
    try:
        return resolve(path) is function
    except (AttributeError, ValueError):
        return False


@cache
def _well_known() -> dict[int, str]:
    """Functions whose own name does not lead to them, such as torch.nn.functional.max_pool2d."""
    found: dict[int, str] = {}
    for holder in FUNCTION_HOLDERS:
        module = importlib.import_module(holder)
        for name in sorted(vars(module)):
            value = getattr(module, name, None)
            if callable(value):
                found.setdefault(id(value), f"{holder}.{name}")
    for identity, name in tensor_methods().items():
        found.setdefault(identity, f"torch.Tensor.{name}")
    return found
