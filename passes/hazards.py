"""What symbolic tracing would freeze or lose of a module's code, read off its bytecode."""

from __future__ import annotations

import contextlib
import dis
import inspect
import types
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn

#: Names in a forward's code, and what tracing would do to what they stand for.
_NAMES = {
    "training": "reads self.training, which a graph would freeze",
    "apply": "calls a custom autograd function, whose backward a graph would lose",
    "no_grad": "switches gradients off, which a graph would lose",
    "enable_grad": "switches gradients on, which a graph would lose",
    "set_grad_enabled": "switches gradients, which a graph would lose",
    "inference_mode": "switches to inference mode, which a graph would lose",
    "is_grad_enabled": "asks whether gradients are recorded, which a graph would freeze",
    "autocast": "switches autocast, which a graph would lose",
    "checkpoint": "recomputes in its backward pass (torch.utils.checkpoint), which a graph would lose",
    "random": "draws random numbers in Python, which a graph would freeze",
}
#: How many calls deep functions of the module's own are looked at.
_DEPTH = 3


def hazard(module: nn.Module) -> str | None:
    """Why the module's own forward must run as Python, or None where nothing speaks against tracing it.

    What is looked for: names (``self.training``, grad mode, autocast, ``checkpoint``, ``Function.apply``, ``random``),
    assignments to attributes, tests for ``isinstance(x, Tensor)`` and decorators, in the forward and in what it calls of
    its own class, its own file and modules of its own package; and ``Function.apply`` under other names, in these, in
    closures and in attributes. Some of it may be harmless where it stands; running it as Python is always right.
    """
    kind: Any = type(module)
    why = _hazard(kind)
    if why is None and any(_is_own_gradient(value) for value in vars(module).values()):
        return _NAMES["apply"]
    return why


@lru_cache(maxsize=4096)
def _hazard(kind: type[nn.Module]) -> str | None:
    forward = kind.forward
    if hasattr(forward, "__wrapped__"):
        return "is decorated, and tracing would run the decorator only once"
    return _of_function(forward, kind, _DEPTH, set())


def _of_function(function: object, kind: type[nn.Module], depth: int, seen: set[types.CodeType]) -> str | None:
    code = getattr(function, "__code__", None)
    if not isinstance(code, types.CodeType) or code in seen:
        return None
    seen.add(code)
    found = _of_code(code)
    if found is not None or depth == 0:
        return found
    for found_there in _named(function, code, kind):
        if _is_own_gradient(found_there):
            return _NAMES["apply"]
        called = getattr(found_there, "__func__", found_there)  # of a static method or a class method
        own = isinstance(called, types.FunctionType) and not called.__module__.startswith("torch.")
        if own and (found := _of_function(called, kind, depth - 1, seen)) is not None:
            return found
    return None


def _named(function: object, code: types.CodeType, kind: type[nn.Module]) -> Iterator[Any]:
    """What the names in a function's code may stand for."""
    scope = getattr(function, "__globals__", {})
    package = kind.__module__.partition(".")[0]
    for name in code.co_names:
        yield inspect.getattr_static(kind, name, None)
        value = scope.get(name)
        yield value
        if isinstance(value, types.ModuleType):
            inside = [vars(value).get(inner) for inner in code.co_names]
            own = value.__name__.partition(".")[0] == package
            yield from (item for item in inside if own or _is_own_gradient(item))
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield cell.cell_contents


def _is_own_gradient(value: object) -> bool:
    """Whether a value is the ``apply`` of a custom autograd function."""
    owner = getattr(value, "__self__", None) if isinstance(value, types.MethodType | types.BuiltinMethodType) else None
    return isinstance(owner, type) and issubclass(owner, torch.autograd.Function)


def _of_code(code: types.CodeType) -> str | None:
    names = set(code.co_names)
    for name, why in _NAMES.items():
        if name in names:
            return why
    if "isinstance" in names and "Tensor" in names:
        return "asks whether a value is a Tensor, which is answered wrongly while tracing"
    if any(instruction.opname == "STORE_ATTR" for instruction in dis.get_instructions(code)):
        return "assigns to an attribute, which a graph would do only once"
    for constant in code.co_consts:  # functions inside, comprehensions
        if isinstance(constant, types.CodeType) and (found := _of_code(constant)) is not None:
            return found
    return None
