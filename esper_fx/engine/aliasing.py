"""Inputs that share memory. Kernels are compiled for inputs that do not, which matters where one is changed in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from esper_fx import _torch


def check(changed: Sequence[int], args: Sequence[Any]) -> Callable[[Sequence[Any]], bool] | None:
    """What to ask before each call of a program: whether memory that it changes is another input's too.

    Args:
        changed: Positions of the inputs that the program changes in place.
        args: Its inputs. A module's own parameters and buffers are taken to be apart from all else.

    Returns:
        A function of the inputs; None where there is nothing to ask.
    """
    loose = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and not _torch.is_owned(arg)]
    asked = [i for i in changed if i in loose]
    return partial(_overlap, asked, loose) if asked and len(loose) > 1 else None


def _overlap(changed: Sequence[int], loose: Sequence[int], args: Sequence[Any]) -> bool:
    spans = {i: _span(args[i]) for i in loose}
    return any(spans[i][0] < spans[j][1] and spans[j][0] < spans[i][1] for i in changed for j in loose if i != j)


def _span(tensor: Tensor) -> tuple[int, int]:
    """Address of its first byte and that behind its last one; alike where it is empty."""
    first = tensor.data_ptr()
    if not tensor.numel():
        return first, first
    elements = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + elements * tensor.element_size()
