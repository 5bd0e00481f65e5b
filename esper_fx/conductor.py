"""The conductor of a model: a coroutine on the engine's thread that works through what there is to get ready."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from esper_fx.cache._background import ForkSafeLock, register_after_fork, yielding

logger = logging.getLogger(__name__)


class Workload(Protocol):
    """What a conductor works on."""

    def work(self) -> list[Future[Any]]:
        """One round; returns what to wait for before the next one, nothing when all is done."""


class Runner(Protocol):
    """Where a conductor runs."""

    def run(self, coroutine: Any) -> Future[Any]:
        """Run a coroutine on the engine's thread."""

    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of that thread."""


class Conductor:
    """Calls ``work`` whenever it is kicked, and again whenever something that the last round waits for is there.

    It holds its workload weakly and ends with it.
    """

    def __init__(self, workload: Workload) -> None:
        self._workload = weakref.ref(workload)
        self._lock = ForkSafeLock()
        self._idle = threading.Event()
        self._idle.set()
        self._kicks = 0
        self._wake: Callable[[], None] | None = None
        self._runner: Runner | None = None
        register_after_fork(self)

    @property
    def busy(self) -> bool:
        """Whether there is work that is not done."""
        return not self._idle.is_set()

    def wait(self, timeout: float) -> bool:
        """Wait until all is done; returns False after ``timeout`` seconds."""
        self.revive()
        return self._idle.wait(timeout)

    def revive(self) -> None:
        """In a forked child: go on with what the parent was at. For whoever is about to wait for it."""
        if self.busy and self._wake is None and self._runner is not None:
            self.kick(self._runner)

    def kick(self, runner: Runner) -> None:
        """There may be something to do; returns at once."""
        with self._lock:
            self._kicks += 1
            self._idle.clear()
            if self._wake is None:
                self._runner = runner
                loop, event = runner.loop(), asyncio.Event()
                self._wake = _waker(loop, event)
                runner.run(_conduct(weakref.ref(self), self._workload, event, self._wake))
                workload = self._workload()
                if workload is not None:
                    weakref.finalize(workload, self._wake)
        self._wake()

    def after_fork_in_child(self) -> None:
        """Forgets the coroutine, whose thread stayed in the parent; the next kick, or who waits, starts another."""
        self._wake = None
        idle, self._idle = self._idle.is_set(), threading.Event()
        if idle:
            self._idle.set()

    def rest(self, kicks: int) -> None:
        """Nothing is left to do, unless there has been a kick since ``kicks`` were counted."""
        with self._lock:
            if self._kicks == kicks:
                self._idle.set()


def _waker(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> Callable[[], None]:
    def wake(_: Any = None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(event.set)

    return wake


async def _conduct(
    reference: weakref.ref[Conductor],
    workload: weakref.ref[Any],
    event: asyncio.Event,
    wake: Callable[..., None],
) -> None:
    while True:
        await event.wait()
        event.clear()
        conductor, target = reference(), workload()
        if conductor is None or target is None:
            return
        kicks = conductor._kicks
        try:
            with yielding:
                waiting = target.work()
        except Exception:
            logger.exception("preparing a change failed; the model runs on as it is")
            waiting = []
        if waiting:
            for future in waiting:
                future.add_done_callback(wake)
        else:
            conductor.rest(kicks)
        del conductor, target, waiting
