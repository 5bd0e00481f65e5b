"""Timing of several sides beside each other in one process, and the statistics of what was measured.

A machine's speed drifts by more than the differences we look for: other programs, clock rates, memory. So the sides
of a comparison take turns, in a new order each round, and what is reported is the quantiles of the *pairwise* ratio:
the sides of one round ran within moments of each other, so the drift cancels.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

Order = Literal["random", "alternating"]

# Fewer give no p20 and p80 worth the name.
LEAST_ROUNDS = 30


@dataclass(frozen=True)
class Quantiles:
    """The 20th, 50th and 80th percentile of a sample."""

    p20: float
    p50: float
    p80: float

    def scaled(self, factor: float) -> Quantiles:
        """All three times ``factor``, for instance to go from seconds to milliseconds."""
        return Quantiles(self.p20 * factor, self.p50 * factor, self.p80 * factor)


def quantile(values: Sequence[float], fraction: float) -> float:
    """Quantile by linear interpolation between order statistics (Hyndman & Fan 1996, type 7: numpy's default).

    Raises:
        ValueError: If there are no values, or ``fraction`` is outside [0, 1].
    """
    if not values:
        raise ValueError("a quantile needs at least one value, and there are none: time at least one round")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction!r}; expected a number from 0 to 1")
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def quantiles(values: Sequence[float]) -> Quantiles:
    """p20, p50 and p80 of ``values``."""
    return Quantiles(quantile(values, 0.2), quantile(values, 0.5), quantile(values, 0.8))


def median(values: Sequence[float]) -> float:
    """The p50 of ``values``."""
    return quantile(values, 0.5)


@dataclass(frozen=True)
class Samples:
    """What an interleaved run measured.

    Attributes:
        seconds: For each side the wall-clock seconds of its turn in every round; element i of each list is round i.
        orders: The order in which the sides ran, round by round.
    """

    seconds: Mapping[str, list[float]]
    orders: list[tuple[str, ...]] = field(default_factory=list)

    def ratio(self, numerator: str, denominator: str) -> Quantiles:
        """Quantiles over the rounds of ``numerator``'s time divided by ``denominator``'s in the same round."""
        above, below = self.seconds[numerator], self.seconds[denominator]
        return quantiles([a / b for a, b in zip(above, below, strict=True)])

    def side(self, name: str) -> Quantiles:
        """Quantiles of one side's seconds."""
        return quantiles(self.seconds[name])


@contextmanager
def gc_off() -> Iterator[None]:
    """No garbage collection inside: a pause would land on one side by chance. What is there is collected first."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def interleave(
    sides: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 3,
    budget_s: float = math.inf,
    order: Order = "random",
    seed: int = 0,
    clock: Callable[[], float] = perf_counter,
) -> Samples:
    """Time every side once per round, all in this process.

    Args:
        sides: Name to callable. A callable does one unit of work (say a training step) and leaves itself ready for
            the next.
        rounds: How often each side is timed, at most.
        warmup: Rounds that run first and are not recorded.
        budget_s: Seconds after which no further round begins, once there are ``LEAST_ROUNDS``.
        order: ``"random"`` draws an order for every round; ``"alternating"`` turns the given order round by round, so
            that each side stands at each place equally often.
        seed: Of the random orders.
        clock: Returns seconds. Tests pass their own.

    Raises:
        ValueError: If there are no sides or no rounds.
    """
    if not sides:
        raise ValueError("there are no sides to time; pass a mapping from name to callable")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds={rounds!r}, warmup={warmup!r}; expected rounds >= 1 and warmup >= 0")
    names = list(sides)
    shuffler = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    orders: list[tuple[str, ...]] = []
    began = clock()
    with gc_off():
        for turn in range(warmup + rounds):
            if turn - warmup >= LEAST_ROUNDS and clock() - began > budget_s:
                break
            if order == "random":
                shuffler.shuffle(names)
            else:
                names = names[1:] + names[:1]
            for name in names:
                started = clock()
                sides[name]()
                elapsed = clock() - started
                if turn >= warmup:
                    seconds[name].append(elapsed)
            if turn >= warmup:
                orders.append(tuple(names))
            # Between rounds, where nothing is timed: without it the cycles of hundreds of steps would pile up.
            if turn % 32 == 31:
                gc.collect()
    return Samples(seconds, orders)


@dataclass
class Stamps:
    """Wall-clock stamps of an uninterrupted loop, so that no time falls between two measurements.

    Timing each step by itself would hide a stall that lands on the bookkeeping between steps. Here the length of a
    step is the time from the end of the step before it to its own end, whatever happened in between.
    """

    clock: Callable[[], float] = perf_counter
    stamps: list[float] = field(default_factory=list)

    def mark(self) -> None:
        """Call once before the first step and after every step."""
        self.stamps.append(self.clock())

    @property
    def seconds(self) -> list[float]:
        """Length of each step."""
        return [later - earlier for earlier, later in zip(self.stamps, self.stamps[1:], strict=False)]


class GcPauses:
    """Records how long Python's garbage collector stops the process, to tell its pauses from other stalls."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def _record(self, phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            self._started = perf_counter()
        else:
            self.seconds.append(perf_counter() - self._started)

    @property
    def longest_ms(self) -> float:
        """The longest pause in milliseconds, 0 where there was none."""
        return max(self.seconds, default=0.0) * 1e3

    def __enter__(self) -> GcPauses:
        gc.callbacks.append(self._record)
        return self

    def __exit__(self, *_error: object) -> None:
        gc.callbacks.remove(self._record)
