"""Whether inputs share memory that a program changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from esper_fx.engine.aliasing import check


def _apart() -> tuple[Tensor, Tensor]:
    return torch.zeros(4, 4), torch.zeros(4)


def _row() -> tuple[Tensor, Tensor]:
    x = torch.zeros(4, 4)
    return x, x[0]


def _last_element() -> tuple[Tensor, Tensor]:
    x = torch.zeros(4, 4)
    return x[:, ::2], x[3, 2:]


def _halves() -> tuple[Tensor, Tensor]:
    x = torch.zeros(4, 4)
    return x[:2], x[2:]


def _empty() -> tuple[Tensor, Tensor]:
    x = torch.zeros(4, 4)
    return x, x[:0]


@pytest.mark.parametrize(
    ("inputs", "shared"), [(_apart, False), (_row, True), (_last_element, True), (_halves, False), (_empty, False)]
)
def test_memory_is_compared(inputs: Callable[[], tuple[Tensor, Tensor]], shared: bool) -> None:
    ask = check([0], [*_apart(), 3])
    assert ask is not None
    assert ask([*inputs(), 3]) == shared
    assert ask([inputs()[0], torch.zeros(1), 3]) is False


def test_nothing_is_asked_where_nothing_is_changed_but_what_a_module_owns() -> None:
    weight = nn.Parameter(torch.zeros(4))
    assert check([], _apart()) is None
    assert check([0], [weight, *_apart()]) is None
    assert check([0], [torch.zeros(4), weight, 3]) is None
