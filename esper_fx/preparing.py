"""Getting ready, beside training, what a model's changes need: the kernels of each, then better plans, then probes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from esper_fx.change_queue import Change
from esper_fx.errors import GerminationError
from esper_fx.seed import KasminaSeed

if TYPE_CHECKING:
    from esper_fx.changes import Changes
    from esper_fx.engine.region import Variant
    from esper_fx.engine.service import Service
    from esper_fx.engine.sized_program import SizedProgram

logger = logging.getLogger(__name__)

#: Seconds until kernels without a pruned body are asked for again, after the first failure and at most; doubled in between.
FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 60.0


class Preparing:
    """What the conductor of one model's changes does, on the engine's thread."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._warned: set[str] = set()

    def work(self) -> list[Future[Any]]:
        """One round of the conductor: ask for kernels that are missing, stage changes that are ready.

        Returns:
            What to wait for before the next round; empty when nothing is left to do.
        """
        changes = self._changes
        with changes.lock:
            waiting: list[Future[Any]] = [*changes.queue.take_back()]
            pending = [(change, changes.live_after(change)) for change in changes.queue]
            programs = list(changes.programs)
            live = changes.live()
        for change, after in pending:
            if change.until is not None and not change.until.done():
                waiting.append(change.until)
            elif not change.ready:
                waiting += self._prepare(change, after, programs)
        if not pending:
            for program in programs:
                waiting += self._improve(program, live)
            if not waiting and changes.measures:
                for program in programs:
                    waiting += self._prepare_probes(program, live)
        return waiting

    def _prepare(self, change: Change, live: set[KasminaSeed], programs: list[SizedProgram]) -> list[Future[Any]]:
        """Get the kernels for one change; stage it when they are there, stage it or put it off when they cannot be had."""
        changes = self._changes
        error: BaseException | None = None
        missing: list[Variant] = []
        try:
            for program in programs:
                missing += program.request(changes.all_of(program, live), urgent=True, retry=not change.tried)
            change.tried = True
            error = next((variant.error for variant in missing if variant.error is not None), None)
        except Exception as problem:
            error = problem
        made = changes.make(programs, live) if error is None and not missing else []
        with changes.lock:
            if change not in changes.queue:
                return []
            if change is changes.queue.first:  # the next boundary's
                changes.offer(made)
            if error is not None and not change.brings:
                return [self._put_off(change, error, programs[0].service)]
            if error is not None:
                change.error = GerminationError(f"{change} no kernel: {error}")
                change.error.__cause__ = error
            if error is not None or not missing:
                changes.stage(change)
        return [variant.future for variant in missing if variant.future is not None and error is None]

    def _put_off(self, change: Change, error: BaseException, service: Service) -> Future[None]:
        """There is no kernel without these bodies: they stay, silent, and others go first, until a pause is over."""
        pause = min(max(2 * change.pause, FIRST_PAUSE_S), LAST_PAUSE_S)
        until: Future[None] = service.run(asyncio.sleep(pause))
        logger.warning(
            "%s to stay for now, silent: there is no kernel without (%s); it is asked for again in %g s",
            change,
            error,
            pause,
        )
        change.put_off(pause, until)
        if self._changes.replicas is None:  # else the others' order of changes would be another one
            self._changes.queue.delay(change)
        return until

    def _improve(self, program: SizedProgram, live: set[KasminaSeed]) -> list[Future[Any]]:
        """Get all plans for the morphology of now ready; the next boundary switches to a better one."""
        changes = self._changes
        everyone = changes.all_of(program, live)
        waiting = self._without_need(
            lambda: program.request(everyone, urgent=False, retry=False),
            unprepared="a program runs on as it is: a better plan could not be prepared",
            unbuilt="a program runs on as it is: a plan that may be better has no kernel",
        )
        with changes.lock:
            if waiting is not None and live == changes.live() and program.has_better(everyone):
                changes.expect_boundary()
        return waiting or []

    def _prepare_probes(self, program: SizedProgram, live: set[KasminaSeed]) -> list[Future[Any]]:
        """Get ready what measures; where that fails, nothing is measured."""
        waiting = self._without_need(
            lambda: program.measuring.prepare(program, live),
            unprepared="a program is not measured: its probes could not be prepared",
            unbuilt="a program is not measured: with probes it has no kernel",
        )
        return waiting or []

    def _without_need(
        self, ask: Callable[[], list[Variant]], *, unprepared: str, unbuilt: str
    ) -> list[Future[Any]] | None:
        """Ask for kernels that training can do without; returns what to wait for, None where they could not be asked for.

        Args:
            ask: Asks, and returns the variants that lack a kernel.
            unprepared: The warning where it fails, without the reason.
            unbuilt: The warning where one of them cannot be had.
        """
        try:
            missing = ask()
        except Exception as error:
            self._warn_once(f"{unprepared}: {error}")
            return None
        for variant in missing:
            if variant.error is not None:
                self._warn_once(f"{unbuilt}: {variant.error}")
        return [variant.future for variant in missing if variant.future is not None and variant.error is None]

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("%s", message)
