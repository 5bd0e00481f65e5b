"""Find in bytecode where code asks what a value *is*: a stand-in for a tensor cannot be kept from answering for itself."""

from __future__ import annotations

import inspect
import types
from collections.abc import Sequence

from esper_fx.passes.bytecode import Step, inner_codes, steps_of

_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")
_OUTSIDE = ("LOAD_GLOBAL", "LOAD_NAME")


def identity_test(function: object, owner: str) -> str | None:
    """What a function asks of a value that only the value itself could answer, in words, or None.

    These are ``x is None``, ``x is y`` and ``type(x)``. Harmless are attributes of the module, globals, constants, and
    ``is None`` of a parameter whose default is None: who traces looks at these.

    Args:
        function: A function of Python.
        owner: What the function calls the module whose attributes are harmless.
    """
    code = getattr(function, "__code__", None)
    if not isinstance(code, types.CodeType):
        return None
    return _in_code(code, {owner, *_optional(function)}, owner)


def _in_code(code: types.CodeType, known: set[str], owner: str) -> str | None:
    steps = steps_of(code)
    known = known | (_known_locals(steps, owner) - set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]))
    for position, step in enumerate(steps):
        if step.name.endswith(("IF_NONE", "IF_NOT_NONE")):
            if not _is_known(steps, position, known):
                return f"asks whether {_spelled(steps, position)} is None, which a graph would freeze"
        elif step.name == "IS_OP":
            against_none = position > 0 and steps[position - 1] == Step("LOAD_CONST", (None,))
            if not (against_none and _is_known(steps, position - 1, known)):
                return "asks with 'is' what a value is, which is answered wrongly while tracing"
        elif step.name in ("LOAD_GLOBAL", "LOAD_NAME") and step.values == ("type",) and position + 1 < len(steps):
            asked = steps[position + 1]
            if asked.name.startswith("LOAD_FAST") and asked.values[0] != owner:
                return f"asks for the type of {asked.values[0]!r}, which is answered wrongly while tracing"
    return next((why for inner in inner_codes(code) if (why := _in_code(inner, known, owner)) is not None), None)


def _optional(function: object) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return []
    return [parameter.name for parameter in parameters if parameter.default is None]


def _known_locals(steps: Sequence[Step], owner: str) -> set[str]:
    """Variables that are only ever given constants and attributes of the module."""
    known: set[str] = set()
    unknown: set[str] = set()
    for position, step in enumerate(steps):
        if not step.name.startswith("STORE_FAST"):
            continue
        last = steps[position - 1] if position else None
        constant = last is not None and last.name == "LOAD_CONST"
        safe = len(step.values) == 1 and (constant or _is_known(steps, position, {owner}))
        (known if safe else unknown).update(map(str, step.values))
    return known - unknown


def _is_known(steps: Sequence[Step], end: int, known: set[str]) -> bool:
    """Whether what the steps before ``end`` load is a known variable, or an attribute of one."""
    position = end - 1
    while position >= 0 and steps[position].name in _ATTRIBUTE:
        position -= 1
    if position < 0:
        return False
    step = steps[position]
    return step.name in _OUTSIDE or (step.name.startswith("LOAD_") and str(step.values[-1]) in known)


def _spelled(steps: Sequence[Step], end: int) -> str:
    return repr(steps[end - 1].values[-1]) if end and steps[end - 1].name.startswith("LOAD_") else "a value"
