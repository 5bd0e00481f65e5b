"""The fields of the seeds' state: their dtypes, what they may hold, and how alpha moves with time."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from esper_fx.checks import real, shown, whole
from esper_fx.errors import LifecycleError
from esper_fx.lifecycle import Stage


class StateError(LifecycleError, ValueError):
    """A value or a schedule that the seeds' state cannot hold."""


class Schedule(enum.IntEnum):
    """How alpha goes to its target. ``NONE``: it rests."""

    CONSTANT = 0
    LINEAR = 1
    COSINE = 2
    NONE = 255


MEASURED = (
    "health",
    "value_mean",
    "value_std",
    "value_absmax",
    "nonfinite",
    "change",
    "grad_rms",
    "grad_absmax",
    "grad_value",
    "potential",
)
"""What telemetry measures, smoothed; see :mod:`esper_fx.telemetry`. NaN until it is measured."""

FIELDS: Mapping[str, tuple[torch.dtype, int | float]] = MappingProxyType(
    {
        "stage": (torch.uint8, int(Stage.DORMANT)),
        "blueprint": (torch.int32, -1),
        "alpha": (torch.float32, 0.0),
        "alpha_from": (torch.float32, 0.0),
        "alpha_target": (torch.float32, 0.0),
        "alpha_rate": (torch.float32, 0.0),
        "gate": (torch.float32, 0.0),
        "schedule": (torch.uint8, int(Schedule.NONE)),
        "schedule_since": (torch.int64, 0),
        "error_count": (torch.int32, 0),
        "stage_since": (torch.int64, 0),
        "embargo_until": (torch.int64, 0),
        "germinations": (torch.int32, 0),
        **dict.fromkeys(MEASURED, (torch.float32, math.nan)),
        "samples": (torch.int64, 0),
        "sampled_at": (torch.int64, -1),
    }
)
"""The fields every seed has: dtype and value at birth."""

TELEMETRY = (*MEASURED, "samples", "sampled_at")
"""Those that hold what was measured."""

MAX_SCHEDULE_STEPS = 1 << 20
"""Longest schedule in steps: up to here float32 tells the last step from the one before."""

MAX_ALPHA = 1e30
"""Largest size of an alpha: the difference of two stays finite in float32."""


def check_value(site: str, field: str, value: object, name: str | None = None) -> int | float:
    """A value as a field holds it, a Python number.

    Args:
        site: The seed's site, for the message.
        field: The field.
        value: The value.
        name: What the caller calls it. Default: as the field.

    Raises:
        StateError: Naming the site, the field, the value and what was expected.
    """
    dtype = FIELDS[field][0]
    number = real(value) if dtype.is_floating_point else whole(value)
    if field == "stage":
        ok, expected = number in tuple(Stage), "a Stage"
    elif field == "schedule":
        ok, expected = number in tuple(Schedule), "a Schedule"
    elif field in MEASURED:
        ok, expected = True, "a number"
    elif dtype.is_floating_point:
        ok, expected = number is not None and abs(number) <= MAX_ALPHA, f"a finite number of at most {MAX_ALPHA:g}"
    else:
        limits = torch.iinfo(dtype)
        ok = number is not None and limits.min <= number <= limits.max
        expected = f"a whole number that fits {dtype}"
    if number is None or not ok:
        raise StateError(f"{name or field}={shown(value)} for the seed at {site!r}: expected {expected}")
    return number


def check_schedule(site: str, schedule: object, steps: object) -> Schedule:
    """The kind of schedule that was asked for; without steps, every schedule is constant.

    Raises:
        StateError: If there is no such schedule, or the steps are out of range.
    """
    kinds = [kind.name.lower() for kind in Schedule if kind is not Schedule.NONE]
    if not isinstance(schedule, str) or schedule not in kinds:
        raise StateError(f"schedule={shown(schedule)} for the seed at {site!r}: expected one of {kinds}")
    number = whole(steps)
    if number is None or not 0 <= number <= MAX_SCHEDULE_STEPS:
        raise StateError(
            f"steps={shown(steps)} for the seed at {site!r}: expected a whole number from 0 to {MAX_SCHEDULE_STEPS}"
        )
    return Schedule[schedule.upper()] if number else Schedule.CONSTANT


def advance_alpha(tensors: Mapping[str, Tensor], now: int) -> Tensor:
    """Move alpha of all seeds along their schedules, in place, with a fixed number of vector operations.

    Args:
        tensors: The fields, ``[n_seeds]`` each.
        now: The clock.

    Returns:
        Mask bool ``[n_seeds]`` of the seeds that have arrived: their alpha is the target exactly, and they rest.
    """
    schedule, rate, target = tensors["schedule"], tensors["alpha_rate"], tensors["alpha_target"]
    progress = ((now - tensors["schedule_since"]) * rate).clamp_(0.0, 1.0)
    # Half a step of slack, because steps * float32(1 / steps) may fall short of 1.
    arrived = ((progress + rate / 2) >= 1.0) | (schedule == Schedule.CONSTANT)
    # sin^2(pi p / 2) is (1 - cos(pi p)) / 2 without the cancellation near p = 0.
    progress = torch.where(schedule == Schedule.COSINE, (progress * (math.pi / 2)).sin_().square_(), progress)
    alpha = torch.where(arrived, target, torch.lerp(tensors["alpha_from"], target, progress))
    scheduled = schedule != Schedule.NONE
    arrived &= scheduled
    tensors["alpha"].data.copy_(torch.where(scheduled, alpha, tensors["alpha"]))
    schedule.masked_fill_(arrived, int(Schedule.NONE))
    return arrived
