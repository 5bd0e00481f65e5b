"""Memory formats between regions."""

from __future__ import annotations

import pytest
import torch

from esper_fx.engine.strides import differing, restrided


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 3, 4), (12, 4, 1)),
        ((2, 3, 4), (12, 1, 3)),
        ((2, 3, 4), (4, 0, 1)),
        ((0, 3), (3, 1)),
        ((), ()),
        ((5, 1), (0, 7)),
    ],
)
def test_a_copy_has_the_strides_and_the_values_and_hands_gradients_on(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    shown = [size if stride else 1 for size, stride in zip(shape, strides, strict=True)]
    value = torch.randn(shown).expand(shape).clone().requires_grad_()
    made = restrided(value, strides)
    assert torch.equal(made, value)
    assert not differing([made], [strides])
    (made * 2).sum().backward()
    assert value.grad is not None
    # Along a dimension that is shown many times only what was shown gets a gradient, all of it.
    assert value.grad.sum() == 2 * value.numel()


def test_only_dimensions_longer_than_one_count() -> None:
    values = [torch.zeros(2, 3).t(), torch.zeros(2, 1), torch.zeros(0, 4), torch.zeros(2, 3)]
    assert differing(values, [(2, 1), (1, 9), (7, 7), (3, 1)]) == (0,)
