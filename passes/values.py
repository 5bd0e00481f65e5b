"""What stands for values while a forward is traced: it refuses to answer what only the value itself could."""

from __future__ import annotations

import dis
import sys
from types import FrameType
from typing import Any

from torch import fx
from torch.fx.proxy import Attribute

from esper_fx.errors import MorphError


class TraceError(MorphError):
    """A module's forward cannot be traced symbolically."""


class _Guarded:
    """Whatever the module's own code asks of the kind of a value is refused, where fx.Proxy would answer for itself.

    ``isinstance(x, tuple)`` would be False and ``hasattr(x, name)`` True, always.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if (sys._getframe(1).f_globals.get("__name__") or "")[:6] == "torch.":
            return type(self)  # as below, without the walk: torch.fx asks this of every argument
        asker = _asker()
        if not _of_torch(asker):
            raise TraceError(
                f"{asker.f_code.co_name} asks of what class a value is, which is answered wrongly while tracing"
            )
        return type(self)

    def __str__(self) -> str:
        return self._told("in words")

    def __repr__(self) -> str:
        return self._told("in words")

    def __format__(self, spec: str) -> str:
        return self._told("in words")

    def __hash__(self) -> int:
        asker = _asker()
        if not _of_torch(asker):
            raise TraceError(f"{asker.f_code.co_name} looks something up by a value, which is not found while tracing")
        return id(self)

    def _told(self, how: str) -> str:
        asker = _asker(3)
        if not _of_torch(asker):
            raise TraceError(f"{asker.f_code.co_name} asks for a value {how}, which is not known while tracing")
        return f"{type(self).__name__}({id(self)})"

    def __getattr__(self, name: str) -> Any:
        asker = _asker()
        if not _of_torch(asker) and not dis.opname[asker.f_code.co_code[asker.f_lasti]].startswith("LOAD_"):
            raise TraceError(f"{asker.f_code.co_name} asks for attribute {name!r} of a value that may not have it")
        return ValueAttribute(self, name)  # type: ignore[arg-type]


class ValueAttribute(_Guarded, Attribute):
    """Stands for an attribute of a value."""


class Value(_Guarded, fx.Proxy):
    """Stands for a value."""


def is_value(value: Any) -> bool:
    """Whether something stands for a value; never refused."""
    return issubclass(type(value), fx.Proxy)


def _asker(depth: int = 2) -> FrameType:
    """The frame of the code that asked, past what Python calls on its behalf."""
    frame = sys._getframe(depth)
    while frame.f_back is not None and frame.f_code.co_name in ("__instancecheck__", "__subclasscheck__"):
        frame = frame.f_back
    return frame


def _of_torch(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "torch"
