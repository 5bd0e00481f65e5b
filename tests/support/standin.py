"""A stand-in for a compiled program: it computes nothing, and its kernels come and fail when a test says so."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import esper_fx
from esper_fx.engine.service import Service

_service: Any = Service(cache=None, store=None, compiler=None)  # type: ignore[arg-type]


@dataclass(eq=False)
class Flight:
    """A kernel that has been asked for."""

    future: Future[None] = field(default_factory=Future)
    error: BaseException | None = None
    kernel: object = None


class StandIn:
    """A program of a model. Keep it alive while it is used.

    Attributes:
        running: The sites whose bodies it runs now.
        asked: For each time a kernel was asked for, the sites that are live in it.
        eager: Whether it runs eagerly until it is told to run what there is a kernel for.
        broken: Why no kernel that is asked for can be made, or None.
        better: The kernel of a better plan for what runs now, or None where there is no such plan.
    """

    service = _service

    def __init__(self, model: esper_fx.MorphableModel) -> None:
        self.growths = [model.growth]
        self.running: frozenset[str] = frozenset()
        self.eager = False
        self.asked: list[frozenset[str]] = []
        self.broken: BaseException | None = None
        self.better: Flight | None = None
        self._flights: dict[frozenset[str], Flight] = {}
        self._kernels: set[frozenset[str]] = {frozenset()}
        model.growth.changes.programs.add(self)  # type: ignore[arg-type]

    def land(self, *sites: str) -> None:
        """From now on there is a kernel with bodies at these sites."""
        self._kernels.add(frozenset(sites))
        flight = self._flights.pop(frozenset(sites), None)
        if flight is not None:
            flight.future.set_result(None)

    def lose(self, *sites: str) -> None:
        """There is no such kernel any more."""
        self._kernels.discard(frozenset(sites))

    def crash(self, *sites: str, error: BaseException) -> None:
        """The kernel that was asked for cannot be made."""
        flight = self._flights[frozenset(sites)]
        flight.error = error
        flight.future.set_exception(error)

    # What Changes asks of a program.

    def can_run(self, live: Iterable[esper_fx.KasminaSeed]) -> bool:
        return _sites(live) in self._kernels

    def activate(self, live: Iterable[esper_fx.KasminaSeed]) -> bool:
        before = self.running
        if self.can_run(live):
            self.running, self.eager = _sites(live), False
        return self.running != before

    restore = activate

    @property
    def complete(self) -> bool:
        return not self.eager

    def run_eagerly(self) -> None:
        self.eager = True

    def make(self, live: Iterable[esper_fx.KasminaSeed]) -> None:
        return None

    def offer(self, made: None) -> None:
        pass

    def has_better(self, live: Iterable[esper_fx.KasminaSeed]) -> bool:
        return self.eager and self.can_run(live)

    def request(self, live: Iterable[esper_fx.KasminaSeed], *, urgent: bool, retry: bool) -> list[Flight]:
        if self.can_run(live):
            return [] if urgent or self.better is None else [self.better]
        sites = _sites(live)
        flight = self._flights.get(sites)
        if flight is None or (retry and flight.error is not None):
            flight = self._flights[sites] = Flight(error=self.broken)
            self.asked.append(sites)
        return [flight]


def _sites(live: Iterable[esper_fx.KasminaSeed]) -> frozenset[str]:
    return frozenset(seed.name for seed in live)


def small_model() -> esper_fx.MorphableModel:
    """Two sites, ``0`` and ``1``; nothing has run it yet."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return esper_fx.morph(net, sites=["0", "1"], example_inputs=(torch.zeros(2, 4),))
