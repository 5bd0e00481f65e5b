"""Bytecode as plain steps, the same for every version of Python."""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass

_SILENT = frozenset({"CACHE", "PRECALL", "PUSH_NULL", "EXTENDED_ARG", "NOP", "NOT_TAKEN", "RESUME", "COPY_FREE_VARS"})


@dataclass(frozen=True)
class Step:
    """An instruction: what it does, and to which names or with which constant. ``x.y()`` loads ``y`` by LOAD_METHOD."""

    name: str
    values: tuple[object, ...]


def steps_of(code: types.CodeType) -> list[Step]:
    """The instructions of a function's code, without those that only serve the interpreter."""
    return list(_steps(code))


def inner_codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The codes of functions and comprehensions inside."""
    return (constant for constant in code.co_consts if isinstance(constant, types.CodeType))


def _steps(code: types.CodeType) -> Iterator[Step]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in _SILENT:
            continue
        name, value = instruction.opname, instruction.argval
        if name == "LOAD_ATTR" and sys.version_info >= (3, 12) and instruction.arg is not None and instruction.arg & 1:
            name = "LOAD_METHOD"
        yield Step(name, value if isinstance(value, tuple) else (value,))
