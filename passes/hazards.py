"""What symbolic tracing would freeze or lose of a module's code, read off its bytecode."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import types
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import fx, nn

from esper_fx.passes.identity import identity_test

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
    "is_autocast_enabled": "asks whether autocast is on, which a graph would freeze",
    "is_tensor": "asks whether a value is a Tensor, which is answered wrongly while tracing",
    "print": "prints, which a graph would not",
}
_REMEMBERS = "remembers results (functools.cache), which tracing would spoil"
#: Instructions of a forward, and what tracing would do to what they do.
_INSTRUCTIONS = {
    "STORE_ATTR": "assigns to an attribute, which a graph would do only once",
    "DELETE_ATTR": "deletes an attribute, which a graph would do only once",
    "STORE_GLOBAL": "assigns to a global variable, which a graph would do only once",
    "DELETE_GLOBAL": "deletes a global variable, which a graph would do only once",
    "PUSH_EXC_INFO": "has a with or a try statement, which a graph would lose",
}
#: How many calls deep functions of the module's own are looked at.
_DEPTH = 3


def hazard(module: nn.Module) -> str | None:
    """Why the module's own forward must run as Python, or None where nothing speaks against tracing it.

    What is looked for: names (``self.training``, grad mode, autocast, ``checkpoint``, ``Function.apply``, ``random``),
    assignments to attributes and globals, ``with`` and ``try``, tests for ``isinstance(x, Tensor)`` and decorators, in the
    forward and in what it calls of its own class, its own file, its own attributes and modules of its own package; and
    ``Function.apply`` and functions with a cache under other names, in these, in closures and in attributes. Some of it
    may be harmless where it stands; running it as Python is always right.
    """
    kind: Any = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by TorchScript"
    if "forward" in vars(module):
        return "is an attribute, in place of its class's"
    if has_own_dunder_call(kind):
        return "is called by a __call__ of its own"
    look = _look(kind)
    if look.why is not None:
        return look.why
    for name, value in vars(module).items():
        if _is_own_gradient(value):
            return _NAMES["apply"]
        if name in look.names and (why := _Look(kind).of_value(value, _DEPTH - 1)) is not None:
            return why
    return None


def has_own_dunder_call(kind: type[nn.Module]) -> bool:
    """Whether a class does something around its forward, in a ``__call__`` of its own."""
    if issubclass(kind, fx.GraphModule):
        return False  # all that it does there is to show where in the graph's code an error came up
    # Not by comparison with nn.Module's, which is another one while something is traced.
    return any("__call__" in vars(base) for base in kind.__mro__[: kind.__mro__.index(nn.Module)])


def names_in_forward(kind: type[nn.Module]) -> frozenset[str]:
    """All names in the code that a class's forward runs, as far as that is looked at."""
    return frozenset(_look(kind).names)  # type: ignore[arg-type]


def codes_of_forward(kind: type[nn.Module]) -> frozenset[types.CodeType]:
    """The code that a class's forward runs, as far as that is looked at."""
    return frozenset(_look(kind).codes)  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def _look(kind: type[nn.Module]) -> _Look:
    look, forward = _Look(kind), kind.forward
    if hasattr(forward, "__wrapped__"):
        look.why = "is decorated, and tracing would run the decorator only once"
    else:
        look.why = look.of_function(forward, _DEPTH)
    return look


class _Look:
    """A look at the code that a class's forward runs.

    Attributes:
        why: The hazard that was found.
        names: All names in the code that was looked at.
        codes: That code.
    """

    def __init__(self, kind: type[Any]) -> None:
        self.kind = kind
        variables = getattr(getattr(kind.forward, "__code__", None), "co_varnames", ())
        self.owner = variables[0] if variables else "self"
        self.why: str | None = None
        self.names: set[str] = set()
        self.codes: set[types.CodeType] = set()

    def of_function(self, function: object, depth: int) -> str | None:
        """Why running a function is a hazard: it itself, or what it calls, so many calls deep."""
        code = getattr(function, "__code__", None)
        if not isinstance(code, types.CodeType) or code in self.codes:
            return None
        self.codes.add(code)
        self.names.update(code.co_names)
        found = _of_code(code) or identity_test(function, self.owner)
        if found is not None or depth == 0:
            return found
        values = _named(function, code, self.kind)
        return next((why for value in values if (why := self.of_value(value, depth - 1)) is not None), None)

    def of_value(self, value: Any, depth: int) -> str | None:
        """Why reading or calling a value is a hazard."""
        if _is_own_gradient(value):
            return _NAMES["apply"]
        if isinstance(value, functools._lru_cache_wrapper):
            return _REMEMBERS
        function = _function(value)
        return None if function is None else self.of_function(function, depth)


def _function(value: Any) -> types.FunctionType | None:
    """The function that reading or calling a value runs, if it is one of Python's and not of PyTorch's."""
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, functools.cached_property):
        value = value.func
    while isinstance(value, functools.partial):
        value = value.func
    if callable(value) and not isinstance(value, nn.Module | type):
        call = type(value).__call__
        value = call if isinstance(call, types.FunctionType) else value
    value = getattr(value, "__func__", value)  # of a method, bound or static or of a class
    own = isinstance(value, types.FunctionType) and not str(value.__module__).startswith("torch.")
    return value if own else None


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
    for instruction in dis.get_instructions(code):
        if (found := _INSTRUCTIONS.get(instruction.opname)) is not None:
            return found
    for constant in code.co_consts:  # functions inside, comprehensions
        if isinstance(constant, types.CodeType) and (found := _of_code(constant)) is not None:
            return found
    return None
