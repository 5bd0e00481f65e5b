"""Timing on a GPU: sides take turns, each with a cold L2 cache, and events on the device tell how long they took."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.harness import Samples

#: More than any L2 cache holds.
FLUSH_BYTES = 512 << 20

#: For about a millisecond the device waits before each turn, in which the host has launched all of it.
WAIT_CYCLES = 2_000_000

#: A side's turn: functions that run one after the other, each timed by itself.
Turn = Sequence[Callable[[], object]]


class NoGpuError(RuntimeError):
    """This benchmark needs a GPU."""


def require_gpu() -> None:
    """Refuse to go on without a GPU.

    Raises:
        NoGpuError: There is none.
    """
    if not torch.cuda.is_available():
        raise NoGpuError(
            "this benchmark needs a GPU, and torch sees none. `esper-fx kernels build` and `pytest -m kernels` check the "
            "kernels without one"
        )


def interleave(sides: Mapping[str, Turn], *, rounds: int, warmup: int = 10, seed: int = 0) -> list[Samples]:
    """Time every part of every side's turn on the device, once per round, in a new order each round.

    What the host does between launches does not count: in a model the device is busy meanwhile. Before each turn the L2
    cache is filled with what was only read. Had that been written, a turn would pay for writing it back: one that only
    reads three quarters more, one that copies as much a third.

    Args:
        sides: Name to turn; all turns have equally many parts, such as forward and backward.
        rounds: How often each is timed.
        warmup: Rounds that run first and are not recorded.
        seed: Of the orders.

    Returns:
        For each part the seconds of every side.
    """
    names = list(sides)
    parts = len(sides[names[0]])
    shuffler = random.Random(seed)
    flush, total = torch.zeros(FLUSH_BYTES // 4, device="cuda"), torch.empty((), device="cuda")
    stamps: dict[str, list[list[Any]]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        shuffler.shuffle(names)
        for name in names:
            torch.sum(flush, 0, out=total)
            torch.cuda._sleep(WAIT_CYCLES)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(parts + 1)]
            events[0].record()
            for event, run in zip(events[1:], sides[name], strict=True):
                run()
                event.record()
            if turn >= warmup:
                stamps[name].append(events)
    torch.cuda.synchronize()
    return [
        Samples({name: [row[part].elapsed_time(row[part + 1]) / 1e3 for row in rows] for name, rows in stamps.items()})
        for part in range(parts)
    ]
