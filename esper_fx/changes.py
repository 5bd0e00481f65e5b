"""Changes of a model's morphology on their way: their kernels are got ready, and a step boundary makes them live."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from esper_fx._garbage import collecting_later
from esper_fx.change_queue import Change, ChangeQueue, Move
from esper_fx.checks import real, shown
from esper_fx.conductor import Conductor
from esper_fx.errors import ArgumentError, GerminationError
from esper_fx.germination import Germination
from esper_fx.lifecycle import Stage
from esper_fx.preparing import Preparing
from esper_fx.seed import KasminaSeed

if TYPE_CHECKING:
    from esper_fx.engine.executable import Prepared
    from esper_fx.engine.program import Program
    from esper_fx.engine.sized_program import SizedProgram
    from esper_fx.growth import Growth
    from esper_fx.replicas import Replicas

logger = logging.getLogger(__name__)

#: Seconds between two looks of who waits: whether it is over, and whether a step boundary is due.
LOOK_S = 0.01


class Changes:
    """The queue of one model's changes, and the step boundaries at which they go live.

    The conductor, a coroutine on the engine's thread, has their kernels got ready (`Preparing`); a boundary on the
    training thread makes live what is ready, in order.

    Attributes:
        lock: Held while a transition is made.
        queue: The changes.
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
        self.lock = growth.lock
        self.queue = ChangeQueue()
        self._boundary_work = False
        self._host = 0.0
        self._epoch = 0
        self._thread: threading.Thread | None = None
        self._preparing = Preparing(self)
        self._conductor = Conductor(self._preparing)

    # Step boundaries, on the thread that runs the model.

    def enter(self, program: Program) -> None:
        """A program is about to run: a step begins if it has run in this step already."""
        self._thread = threading.current_thread()
        if self.replicas is not None:
            self.replicas.averaging.begin_forward()
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
        if self.replicas is not None:
            self.replicas.averaging.begin_forward()
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

    def is_ready(self, change: Change) -> bool:
        """Whether a step boundary can make a change, or knows that it has failed."""
        if change.ready and change.error is None and not self._can_run(self.live_after(change)):
            change.ready = False  # a program has come meanwhile
            self.kick()
        return change.ready

    def _is_due(self, change: Change) -> bool:
        return self.is_ready(change) if self.replicas is None else change.agreed

    def apply(self) -> None:
        """Make live what is ready; the calling thread must be between two steps."""
        with self.lock, collecting_later():
            self._boundary_work = False
            while self.queue and self._is_due(self.queue.first):
                change = self.queue.first
                self.queue.remove(change)
                for move in change.moves:
                    self._growth.commit(move, change.error)
            live, programs = self.live(), list(self.programs)
            if self.replicas is not None:
                self._make_way(programs, live)
            self.swaps += sum(program.activate(self.all_of(program, live)) for program in programs)
            if self.replicas is not None:
                self.replicas.averaging.watch()
            # Waking the engine's thread costs a step as much as the switch does.
            if self.queue or self._growth.sampler is not None or not all(program.complete for program in programs):
                self.kick()

    def _make_way(self, programs: list[SizedProgram], live: set[KasminaSeed]) -> None:
        """Have programs run eagerly for now that have come, perhaps here only, since these bodies were voted for."""
        for program in programs:
            everyone = self.all_of(program, live)
            if not program.can_run(everyone):
                program.run_eagerly()

    # Copies and checkpoints.

    def resume(self) -> None:
        """Take up what was on its way when the model was copied or saved, in the order in which it had begun."""
        with self.lock:
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
        coming = {move.seed for _, move in self.queue.moves()}
        return [
            seed
            for seed in self._growth.by_index
            if seed not in coming and seed.stage == (Stage.EMBARGOED if seed.live else Stage.GERMINATING)
        ]

    def abandon(self, why: str) -> None:
        """Forget everything that is on its way; who waits for a germination gets ``why`` in an error."""
        with self.lock:
            abandoned = self.queue.clear()
            self._boundary_work = self.unfinished = False
            self._forget()
        for move in (move for change in abandoned for move in change.moves):
            if move.germination is not None:
                move.germination.settle(GerminationError(f"the body at site {move.seed.name!r} is gone: {why}"))

    def restored(self) -> None:
        """The model has other bodies, between two steps: let no program run the old ones. May compile, and so block."""
        live = self.live()
        self.swaps += sum(program.restore(self.all_of(program, live)) for program in list(self.programs))
        if self.replicas is not None:
            self.replicas.averaging.watch()
        self.resume()
        self.kick()

    # The queue.

    def add(self, *moves: Move) -> None:
        """Queue a change of these moves; if everything for it is there already, the next step boundary makes it."""
        if not moves:
            return
        change, waiting = Change(list(moves)), list(self.queue)
        self.queue.add(change)
        if not self.programs:
            change.ready = True
            self.apply()  # where there are replicas, only once they agree
            return
        live = self.live_after(change)
        if all(c.ready for c in waiting) and self._can_run(live):
            self.stage(change)
            if not waiting:
                self.offer(self.make(list(self.programs), live))
        self.kick()

    def withdraw(self, seed: KasminaSeed) -> Move | None:
        """Take what is on its way for a seed out of the queue, if anything is."""
        move = self.queue.withdraw(seed)
        if move is not None:
            self._forget()
        return move

    def on_their_way(self) -> list[tuple[Change, Move]]:
        """What is asked for and not live yet, in order, each with its change; last what was put off."""
        return list(self.queue.moves())

    def stage(self, change: Change) -> None:
        """Everything for a change is there: the next step boundary makes it."""
        change.ready = True
        self.expect_boundary()

    def expect_boundary(self) -> None:
        """There is something to do at the next step boundary."""
        self._boundary_work = True

    @property
    def replicas(self) -> Replicas | None:
        """The processes that train replicas of the model, where what grows is kept alike in them."""
        return self._growth.replicas

    @property
    def measures(self) -> bool:
        """Whether some steps are measured."""
        return self._growth.sampler is not None

    def live(self) -> set[KasminaSeed]:
        """The seeds that have a live body."""
        return {seed for seed in self._growth.by_index if seed.live}

    def live_after(self, change: Change) -> set[KasminaSeed]:
        """Those that have one once a change has been made, and all before it."""
        return self.queue.live_after(change, self.live())

    def all_of(self, program: SizedProgram, live: set[KasminaSeed]) -> set[KasminaSeed]:
        """These seeds of this model, and the live ones of the other models that are part of the same program."""
        others = [growth for growth in program.growths if growth is not self._growth]
        return live.union(seed for growth in others for seed in growth.by_index if seed.live) if others else live

    def _can_run(self, live: set[KasminaSeed]) -> bool:
        return all(program.can_run(self.all_of(program, live)) for program in list(self.programs))

    def kick(self) -> None:
        """Let the conductor look at what there is to do."""
        if self.programs:
            self._conductor.kick(next(iter(self.programs)).service)

    def make(self, programs: list[SizedProgram], live: set[KasminaSeed]) -> list[tuple[SizedProgram, Prepared | None]]:
        """What each program will run, made now where it can be; the boundary makes what is missing."""
        try:
            return [(program, program.make(self.all_of(program, live))) for program in programs]
        except Exception as error:  # another model, whose seeds sit in the same program, may change meanwhile
            logger.debug("a switch could not be made ready: %s", error)
            return []

    @staticmethod
    def offer(made: list[tuple[SizedProgram, Prepared | None]]) -> None:
        """Keep what was made for the next boundary."""
        for program, running in made:
            program.offer(running)

    def _forget(self) -> None:
        self.offer([(program, None) for program in list(self.programs)])

    # Waiting.

    @property
    def pending(self) -> bool:
        """Whether a change or a better plan is on its way."""
        return (
            bool(self.queue or self.queue.put_off)
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
            if self.replicas is not None:
                await self.replicas.votes.look_without_thread()
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
        staying = seconds > 0
        while True:
            rest = deadline - time.monotonic()
            if staying:
                staying = self._look(rest > 0)
            else:
                self.apply_between_steps()
            if over():
                return True
            if not staying:
                return False
            time.sleep(max(0.0, min(LOOK_S, rest)))

    def _look(self, staying: bool) -> bool:
        """Make the step boundary that is due while somebody waits; returns whether to wait on.

        Args:
            staying: Whether there is time left. All processes that train replicas of the model wait alike.
        """
        if self.replicas is not None:
            staying = self.replicas.votes.look(staying)
        self.apply_between_steps()
        return staying
