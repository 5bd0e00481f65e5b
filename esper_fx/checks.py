"""What a caller hands over, checked on the way in, and shown in an error: pure functions, never called within a step."""

from __future__ import annotations

import builtins
import difflib
import numbers
import operator
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from esper_fx.errors import EsperError


class _Short(reprlib.Repr):
    """Representations of one line; of tensors and arrays, what they are instead of what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlong = 40
        self.maxstring = self.maxother = 120

    def repr1(self, x: Any, level: int) -> str:
        try:
            shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
        except Exception:  # a tensor that has no shape yet says so in this way
            return f"<{type(x).__name__}>"
        if isinstance(shape, tuple) and shape and dtype is not None:
            return f"<{type(x).__name__} {list(shape)}, {dtype}>"
        if isinstance(x, dict):  # of a class of its own as well
            return self.repr_dict(x, level)
        return super().repr1(x, level)

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # more digits than Python writes
            return f"<int of {x.bit_length()} bits>"

    def repr_instance(self, x: Any, level: int) -> str:
        try:
            text = " ".join(builtins.repr(x).split())
        except Exception:  # whatever is wrong with it, it is another error that has to be told
            return f"<{type(x).__name__}>"
        return shortened(text, self.maxother)


_short = _Short()


def shown(value: object) -> str:
    """A value for an error: its ``repr``, in one line and of bounded length."""
    return shortened(_short.repr(value), 400)


def cause(error: BaseException) -> str:
    """An error for the message of another: its class and what it says, of bounded length."""
    text = str(error).partition("\nException raised from ")[0]  # else torch's own C++ frames follow
    return f"{type(error).__name__}: {shortened(text)}"


def shortened(text: str, most: int = 800) -> str:
    """A text, or its beginning where it is longer than that."""
    return text if len(text) <= most else f"{text[: most - 4].rstrip()} ..."


def whole(value: object) -> int | None:
    """A whole number as an int, of numpy or a tensor as well; None where it is none. True and False are none."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except Exception:  # tensors have errors of their own
        return None


def real(value: object) -> float | None:
    """A real number as a float, of numpy as well; None where it is none, or too large. True and False are none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def path_of(value: object, what: str, error: type[EsperError]) -> Path:
    """A path from what stands for one.

    Args:
        value: A text or anything path-like.
        what: Its name, and what it is the path of: "path", "a folder".
        error: What to raise.

    Raises:
        EsperError: Of the class ``error``: it is something else.
    """
    try:
        return Path(value)  # type: ignore[arg-type]
    except TypeError:
        raise error(f"{what}: expected a path, as text or a pathlib.Path, not {shown(value)}") from None


def names_of(value: object, what: str, error: type[EsperError]) -> list[str]:
    """Several names, or one, as a list without repetitions.

    Raises:
        EsperError: Of the class ``error``: it is something else.
    """
    if isinstance(value, str):
        return [value]
    names: list[Any] = list(value) if isinstance(value, Iterable) and not isinstance(value, bytes) else [value]
    for name in names:
        if not isinstance(name, str):
            raise error(f"{what}={shown(value)}: expected a name or several names, not {shown(name)}")
    return list(dict.fromkeys(names))


def nearest(name: object, among: Iterable[str], most: int = 3) -> str:
    """The names that come nearest to another, for an error: quoted, separated by commas; "none" where there are none."""
    found = difflib.get_close_matches(shown(name).strip("'"), list(among), n=most, cutoff=0.0)
    return ", ".join(map(repr, found)) or "none"
