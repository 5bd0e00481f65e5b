"""Triton's interpreter, made to compute bfloat16 as GPUs do.

It multiplies bfloat16 operands as the integers that hold them, widens subnormal ones to something else, and cuts float32 off
to bfloat16 instead of rounding it, which is twice as far off and always towards zero.
"""

from __future__ import annotations

from typing import Any

import numpy
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float
_create_dot = interpreter.InterpreterBuilder.create_dot


def rounded(values: Any) -> Any:
    """float32 to the nearest bfloat16, ties to even, as uint16."""
    bits = numpy.ascontiguousarray(values, dtype=numpy.float32).view(numpy.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return numpy.where(numpy.isnan(values), (bits >> 16) | 0x40, nearest).astype(numpy.uint16)


def _convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source == tl.float32 and target == tl.bfloat16:
        return rounded(values)
    if source == tl.bfloat16 and target == tl.float32:
        return values.astype(numpy.uint32) << 16
    return _convert_float(values, source, target, rounding)


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return interpreter.TensorHandle(
        _convert(operand.data, tl.bfloat16, tl.float32, None).view(numpy.float32), tl.float32
    )


def _dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
    return _create_dot(self, _widened(a), _widened(b), *others)


def mend() -> None:
    """Mend the interpreter of this process; may be called again."""
    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.create_dot = _dot
