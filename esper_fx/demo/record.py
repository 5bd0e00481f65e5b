"""What a demo measures, as plain rows, and the figures drawn from them. Seconds are wall-clock seconds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

AFTER = 20
"""Steps after an event's end that still count as around it."""

_STEADY = 200


@dataclass(frozen=True)
class Step:
    """One training step.

    Attributes:
        loss: Of the batch, in nats.
        seconds: From drawing the batch to the optimizer's end, with the calls to esper_fx made since the step before.
        alphas: Of the trials' seeds, in the trials' order; 0 while a seed has no live body.
    """

    loss: float
    seconds: float
    alphas: tuple[float, ...]


@dataclass
class Event:
    """A change asked for at a step.

    Attributes:
        what: For people: "germinate depthwise_conv".
        step: Index of the first step after the request.
        call_seconds: Seconds that the request itself took.
        live: Index of the first step with the change in effect; None until then.
        live_seconds: Seconds from the request to that step.
        settled: Index of the first step after no kernel was on its way for it any more; None where it never came to that.
    """

    what: str
    site: str
    step: int
    call_seconds: float
    live: int | None = None
    live_seconds: float | None = None
    settled: int | None = None


@dataclass
class Record:
    """Everything that one run of a demo measured; accuracies are shares of right answers."""

    steps: list[Step] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)
    accuracies: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    without: dict[str, float] = field(default_factory=dict)


def median_seconds(steps: Sequence[Step]) -> float:
    """Median length of a step; NaN for none."""
    return statistics.median(step.seconds for step in steps) if steps else float("nan")


def steps_per_second(steps: Sequence[Step]) -> float:
    """Throughput, stalls included; NaN for no steps."""
    return len(steps) / sum(step.seconds for step in steps) if steps else float("nan")


def steady_steps(record: Record) -> list[Step]:
    """The last steps before the first event: the network as it was. The first of all, which compiled, is not among them."""
    first = record.events[0].step if record.events else len(record.steps)
    return record.steps[max(1, first - _STEADY) : first]


def steady_seconds(record: Record) -> float:
    """Median length of the last steps before the first event: the network as it was."""
    return median_seconds(steady_steps(record))


def longest_step(record: Record, event: Event) -> Step:
    """The longest step from the event until 20 steps after its last kernel took over, or until the run's end."""
    end = len(record.steps) if event.settled is None else event.settled + AFTER
    return max(record.steps[event.step : end], key=lambda step: step.seconds)


def smooth(values: Sequence[float], width: int = 50) -> list[float]:
    """Moving average over the last `width` values."""
    total, means = 0.0, []
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        means.append(total / min(index + 1, width))
    return means
