"""From what probes measured in one step to the state arrays: merged by seed, and smoothed, all seeds at once.

Shapes: k rows were measured, of a model with n seeds. A seed has several rows where its module is called several times.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from esper_fx.ops.probe import GRADIENTS, VALUES
from esper_fx.state_fields import MEASURED

_ABSMAX = 3  # among VALUES
_GRAD_ABSMAX = 1  # among GRADIENTS
_POTENTIAL = MEASURED.index("potential")


def merge_values(seeds: Tensor, rows: Tensor, n: int) -> Tensor:
    """Merge rows of the same seed; float64 ``[n, len(VALUES)]``, zero for seeds without one.

    Means and M2 are merged by the formula of Chan, Golub and LeVeque (1983).

    Args:
        seeds: int64 ``[k]``, whose rows they are.
        rows: Float64 ``[k, len(VALUES)]``.
        n: Number of seeds.
    """
    merged = rows.new_zeros(n, len(VALUES)).index_add_(0, seeds, rows)
    count = merged[:, 0]
    mean = rows.new_zeros(n).index_add_(0, seeds, rows[:, 0] * rows[:, 1]) / count.clamp(min=1)
    between = rows[:, 0] * (rows[:, 1] - mean[seeds]).square()
    merged[:, 1] = mean
    merged[:, 2].index_add_(0, seeds, between)
    merged[:, _ABSMAX] = rows.new_zeros(n).scatter_reduce_(0, seeds, rows[:, _ABSMAX], "amax")
    return merged


def merge_gradients(seeds: Tensor, rows: Tensor, n: int) -> Tensor:
    """Merge rows of the same seed; float64 ``[n, len(GRADIENTS)]``, zero for seeds without one.

    Args:
        seeds: int64 ``[k]``, whose rows they are.
        rows: Float64 ``[k, len(GRADIENTS)]``.
        n: Number of seeds.
    """
    merged = rows.new_zeros(n, len(GRADIENTS)).index_add_(0, seeds, rows)
    merged[:, _GRAD_ABSMAX] = rows.new_zeros(n).scatter_reduce_(0, seeds, rows[:, _GRAD_ABSMAX], "amax")
    return merged


def measurements(values: Tensor, gradients: Tensor, has_gradient: Tensor, potential: Tensor) -> Tensor:
    """What is told of one step; float64 ``[len(MEASURED), n]``, NaN where nothing can be.

    Args:
        values: Merged, ``[n, len(VALUES)]``.
        gradients: Merged, ``[n, len(GRADIENTS)]``.
        has_gradient: Bool ``[n]``, where gradients were measured.
        potential: Float64 ``[n]``, the sums of squares of the sketches, which are smoothed themselves.
    """
    count, mean, m2, absmax, nonfinite, change = values.unbind(1)
    squares, grad_absmax, grad_value, grad_change = gradients.unbind(1)
    elements = count + nonfinite
    nan = torch.full_like(count, torch.nan)
    size = (m2 + count * mean.square()).sqrt()  # of the value
    table = {
        "health": torch.where(has_gradient & (change > 0), -grad_change, nan),
        "value_mean": torch.where(count > 0, mean, nan),
        "value_std": torch.where(count > 0, (m2 / count).sqrt(), nan),
        "value_absmax": torch.where(count > 0, absmax, nan),
        "nonfinite": torch.where(elements > 0, nonfinite, nan),
        "change": torch.where(elements > 0, change.sqrt() / size, nan),
        "grad_rms": torch.where(has_gradient, (squares / elements).sqrt(), nan),
        "grad_absmax": torch.where(has_gradient, grad_absmax, nan),
        "grad_value": torch.where(has_gradient, grad_value, nan),
        "potential": potential,
    }
    return torch.stack([table[field] for field in MEASURED])


def smoothed(before: Mapping[str, Tensor], table: Tensor, decay: float) -> dict[str, Tensor]:
    """The fields after one more step: an exponential moving average that begins with the first value.

    What is not finite is left out, so that a step whose gradients overflow spoils nothing.

    Args:
        before: The fields ``MEASURED``, ``[n]`` each.
        table: ``[len(MEASURED), n]`` as :func:`measurements` gives it.
        decay: Weight of what was before, 0 to 1.
    """
    old = torch.stack([before[field] for field in MEASURED]).to(table.dtype)
    new = torch.where(torch.isnan(old), table, torch.lerp(table, old, decay))
    new[_POTENTIAL] = table[_POTENTIAL]  # of what is smoothed already
    return dict(zip(MEASURED, torch.where(torch.isfinite(table), new, old).unbind(0), strict=True))
