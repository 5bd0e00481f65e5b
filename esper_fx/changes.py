"""Changes of a model's morphology on their way: their kernels are got ready, and a step boundary makes them live."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from esper_fx._garbage import collecting_later
from esper_fx.change_queue import Change, ChangeQueue, Move
from esper_fx.checks import real, shown
from esper_fx.conductor import Conductor
from esper_fx.errors import ArgumentError, GerminationError
from esper_fx.germination import Germination
from esper_fx.lifecycle import Stage
from esper_fx.seed import KasminaSeed

if TYPE_CHECKING:
    from esper_fx.engine.executable import Prepared
    from esper_fx.engine.program import Program
    from esper_fx.engine.region import Variant
    from esper_fx.engine.service import Service
    from esper_fx.engine.sized_program import SizedProgram
    from esper_fx.growth import Growth

logger = logging.getLogger(__name__)

#: Seconds between two looks of who waits: whether it is over, and whether a step boundary is due.
LOOK_S = 0.01

#: Seconds until kernels without a pruned body are asked for again, after the first failure and at most; doubled in between.
FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 60.0


class Changes:
    """The queue of one model's changes, and the step boundaries at which they go live.

    The conductor, a coroutine on the engine's thread, gets their kernels ready, in order; a boundary on the training
    thread makes live what is ready.

    Attributes:
        programs: The compiled programs that run the model.
        unfinished: Whether the model is a copy that has yet to take over what was on its way in the original.
        recompiles: Recompiles by Dynamo.
        swaps: Times a program switched to another executable.
        longest_host: Longest time in seconds that the engine took on the training thread in one step.
    """

    def __init__(self, growth: Growth) -> None:
        self.programs: weakref.WeakSet[SizedProgram] = weakref.WeakSet()
        self.unfinished = False
        self.recompiles = 0
        self.swaps = 0
        self.longest_host = 0.0
        self._growth = growth
        self._lock = growth.lock
        self._queue = ChangeQueue()
        self._warned: set[str] = set()
        self._boundary_work = False
        self._host = 0.0
        self._epoch = 0
        self._thread: threading.Thread | None = None
        self._conductor = Conductor(self)

    # Step boundaries, on the thread that runs the model.

    def enter(self, program: Program) -> None:
        """A program is about to run: a step begins if it has run in this step already."""
        self._thread = threading.current_thread()
        handle = self._growth.handle
        if program.epochs[handle] == self._epoch:
            self._epoch += 1
            self.begin_step()
        elif (sampler := self._growth.sampler) is not None:
            sampler.join_step(self._growth.clock)
        program.epochs[handle] = self._epoch

    def begin_step(self) -> None:
        """A step boundary: make live what is ready, and let the clock tick where no optimizer does."""
        self.longest_host = max(self.longest_host, self._host)
        self._host = 0.0
        started = time.perf_counter()
        self._apply_what_is_due()
        attachment = self._growth.attachment
        if attachment is None or attachment.optimizer is None:
            self._growth.tick()
        sampler = self._growth.sampler  # read once: another thread may close it
        if sampler is not None:
            sampler.begin_step(self._growth.clock)
        self._host += time.perf_counter() - started

    def begin_eager_forward(self) -> None:
        """The model is called without a compiled program."""
        self._thread = threading.current_thread()
        self.begin_step()

    def reset_stats(self) -> None:
        """Begin to count anew."""
        self.recompiles = self.swaps = 0
        self.longest_host = self._host = 0.0

    def count_host_time(self, seconds: float) -> None:
        """Time that the engine itself took on the training thread in this step."""
        self._host += seconds

    def apply_between_steps(self) -> None:
        """Make live what is ready, if anything is and the calling thread is the one that runs the model, or none does."""
        if (self.unfinished or self._boundary_work) and self._may_apply():
            self._apply_what_is_due()

    def _may_apply(self) -> bool:
        thread = self._thread
        return thread is None or thread is threading.current_thread() or thread not in threading.enumerate()

    def _apply_what_is_due(self) -> None:
        if self.unfinished:
            self.resume()
        if self._boundary_work:
            self.apply()

    def apply(self) -> None:
        """Make live what is ready; the calling thread must be between two steps."""
        with self._lock, collecting_later():
            self._boundary_work = False
            while self._queue and self._queue.first.ready:
                change = self._queue.first
                if change.error is None and not self._can_run(self._live_after(change)):
                    change.ready = False  # a program has come meanwhile
                    break
                self._queue.remove(change)
                for move in change.moves:
                    self._growth.commit(move, change.error)
            live, programs = self._live(), list(self.programs)
            self.swaps += sum(program.activate(self._all_of(program, live)) for program in programs)
            # Waking the engine's thread costs a step as much as the switch does.
            if self._queue or self._growth.sampler is not None or not all(program.complete for program in programs):
                self.kick()

    # Copies and checkpoints.

    def resume(self) -> None:
        """Take up what was on its way when the model was copied or saved, in the order in which it had begun."""
        with self._lock:
            self.unfinished = False
            begun = {event.site: number for number, event in enumerate(self._growth.ledger)}
            for seed in sorted(self._interrupted(), key=lambda seed: begun.get(seed.name, -1)):
                if seed.stage == Stage.GERMINATING:
                    trained = bool(self._growth.state.read("gate", seed.index))  # it was given weights
                    self.add(Move(seed, Germination(seed), Stage.ACTIVE if trained else Stage.INCUBATING))
                else:
                    self.add(Move(seed, None, Stage.EMBARGOED))

    def _interrupted(self) -> list[KasminaSeed]:
        """Seeds whose body should come or go, and no change in the queue sees to it."""
        coming = {move.seed for _, move in self._queue.moves()}
        return [
            seed
            for seed in self._growth.by_index
            if seed not in coming and seed.stage == (Stage.EMBARGOED if seed.live else Stage.GERMINATING)
        ]

    def abandon(self, why: str) -> None:
        """Forget everything that is on its way; who waits for a germination gets ``why`` in an error."""
        with self._lock:
            abandoned = self._queue.clear()
            self._boundary_work = self.unfinished = False
            self._forget()
        for move in (move for change in abandoned for move in change.moves):
            if move.germination is not None:
                move.germination.settle(GerminationError(f"the body at site {move.seed.name!r} is gone: {why}"))

    def restored(self) -> None:
        """The model has other bodies, between two steps: let no program run the old ones. May compile, and so block."""
        live = self._live()
        self.swaps += sum(program.restore(self._all_of(program, live)) for program in list(self.programs))
        self.resume()
        self.kick()

    # The queue.

    def add(self, *moves: Move) -> None:
        """Queue a change of these moves; if everything for it is there already, the next step boundary makes it."""
        if not moves:
            return
        change, waiting = Change(list(moves)), list(self._queue)
        self._queue.add(change)
        if not self.programs:
            change.ready = True
            self.apply()
            return
        live = self._live_after(change)
        if all(c.ready for c in waiting) and self._can_run(live):
            self._stage(change)
            if not waiting:
                self._offer(self._made(list(self.programs), live))
        self.kick()

    def withdraw(self, seed: KasminaSeed) -> Move | None:
        """Take what is on its way for a seed out of the queue, if anything is."""
        move = self._queue.withdraw(seed)
        if move is not None:
            self._forget()
        return move

    def on_their_way(self) -> list[tuple[Change, Move]]:
        """What is asked for and not live yet, in order, each with its change; last what was put off."""
        return list(self._queue.moves())

    def _stage(self, change: Change) -> None:
        change.ready = True
        self._boundary_work = True

    def _live(self) -> set[KasminaSeed]:
        return {seed for seed in self._growth.by_index if seed.live}

    def _live_after(self, change: Change) -> set[KasminaSeed]:
        return self._queue.live_after(change, self._live())

    def _all_of(self, program: SizedProgram, live: set[KasminaSeed]) -> set[KasminaSeed]:
        """These seeds of this model, and the live ones of the other models that are part of the same program."""
        others = [growth for growth in program.growths if growth is not self._growth]
        return live.union(seed for growth in others for seed in growth.by_index if seed.live) if others else live

    def _can_run(self, live: set[KasminaSeed]) -> bool:
        return all(program.can_run(self._all_of(program, live)) for program in list(self.programs))

    # Getting kernels ready.

    def kick(self) -> None:
        """Let the conductor look at what there is to do."""
        if self.programs:
            self._conductor.kick(next(iter(self.programs)).service)

    def work(self) -> list[Future[Any]]:
        """One round of the conductor: ask for kernels that are missing, stage changes that are ready.

        Returns:
            What to wait for before the next round; empty when nothing is left to do.
        """
        with self._lock:
            waiting: list[Future[Any]] = [*self._queue.take_back()]
            pending = [(change, self._live_after(change)) for change in self._queue]
            programs = list(self.programs)
            live = self._live()
        for change, after in pending:
            if not change.ready:
                waiting += self._prepare(change, after, programs)
        if not pending:
            for program in programs:
                waiting += self._improve(program, live)
            if not waiting and self._growth.sampler is not None:
                for program in programs:
                    waiting += self._prepare_probes(program, live)
        return waiting

    def _prepare(self, change: Change, live: set[KasminaSeed], programs: list[SizedProgram]) -> list[Future[Any]]:
        """Get the kernels for one change; stage it when they are there, stage it or put it off when they cannot be had."""
        error: BaseException | None = None
        missing: list[Variant] = []
        try:
            for program in programs:
                missing += program.request(self._all_of(program, live), urgent=True, retry=not change.tried)
            change.tried = True
            error = next((variant.error for variant in missing if variant.error is not None), None)
        except Exception as problem:
            error = problem
        made = self._made(programs, live) if error is None and not missing else []
        with self._lock:
            if change not in self._queue:
                return []
            if change is self._queue.first:  # the next boundary's
                self._offer(made)
            if error is not None and not change.brings:
                return [self._put_off(change, error, programs[0].service)]
            if error is not None:
                change.error = GerminationError(f"{change} no kernel: {error}")
                change.error.__cause__ = error
            if error is not None or not missing:
                self._stage(change)
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
        self._queue.delay(change, pause, until)
        return until

    def _made(self, programs: list[SizedProgram], live: set[KasminaSeed]) -> list[tuple[SizedProgram, Prepared | None]]:
        """What each program will run, made now where it can be; the boundary makes what is missing."""
        try:
            return [(program, program.make(self._all_of(program, live))) for program in programs]
        except Exception as error:  # another model, whose seeds sit in the same program, may change meanwhile
            logger.debug("a switch could not be made ready: %s", error)
            return []

    @staticmethod
    def _offer(made: list[tuple[SizedProgram, Prepared | None]]) -> None:
        for program, running in made:
            program.offer(running)

    def _forget(self) -> None:
        self._offer([(program, None) for program in list(self.programs)])

    def _improve(self, program: SizedProgram, live: set[KasminaSeed]) -> list[Future[Any]]:
        """Get all plans for the morphology of now ready; the next boundary switches to a better one."""
        everyone = self._all_of(program, live)
        waiting = self._without_need(
            lambda: program.request(everyone, urgent=False, retry=False),
            unprepared="a program runs on as it is: a better plan could not be prepared",
            unbuilt="a program runs on as it is: a plan that may be better has no kernel",
        )
        with self._lock:
            if waiting is not None and live == self._live() and program.has_better(everyone):
                self._boundary_work = True
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

    # Waiting.

    @property
    def pending(self) -> bool:
        """Whether a change or a better plan is on its way."""
        return (
            bool(self._queue or self._queue.put_off)
            or self._boundary_work
            or self._conductor.busy
            or (self.unfinished and bool(self._interrupted()))
        )

    def wait_for(self, germination: Germination, timeout: float | None) -> bool:
        """See :meth:`Germination.wait`."""
        return self._until(germination.done, timeout)

    async def wait_without_thread(self, germination: Germination) -> None:
        """As :meth:`wait_for`, for a coroutine: nothing is left behind where it is cancelled."""
        self._conductor.revive()
        while True:
            self.apply_between_steps()
            if germination.done():
                return
            await asyncio.sleep(LOOK_S)

    def settle(self, timeout: float | None) -> bool:
        """Block until no background work is left and the best plan runs; call it between steps."""
        return self._until(lambda: not self.pending, timeout)

    def _until(self, over: Callable[[], bool], timeout: float | None) -> bool:
        """Block until something holds, and make the step boundaries that are due meanwhile; False: it took too long."""
        seconds = math.inf if timeout is None else real(timeout)
        if seconds is None or math.isnan(seconds):
            raise ArgumentError(
                f"timeout={shown(timeout)}: expected seconds as a number, or None to wait as long as it takes"
            )
        deadline = time.monotonic() + seconds
        self._conductor.revive()
        while True:
            self.apply_between_steps()
            if over():
                return True
            rest = deadline - time.monotonic()
            if rest <= 0:
                return False
            time.sleep(min(LOOK_S, rest))
