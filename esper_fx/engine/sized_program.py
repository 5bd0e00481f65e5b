"""A program for some sizes: it runs the best executable there is and switches at a step boundary."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from esper_fx import _torch
from esper_fx.engine import aliasing
from esper_fx.engine.bodies import BodyGoneError, known_record, record_once
from esper_fx.engine.build import Ambient
from esper_fx.engine.executable import Executable, Prepared
from esper_fx.engine.measuring import Measuring
from esper_fx.engine.pins import Pins
from esper_fx.engine.plan import Assignment, Layout, Plan, Slot
from esper_fx.engine.region import Variant
from esper_fx.engine.service import Service, service
from esper_fx.errors import SiteError
from esper_fx.passes.carry_sizes import SizesError
from esper_fx.passes.metas import examples
from esper_fx.settings import settings

if TYPE_CHECKING:
    from esper_fx.engine.program import Program
    from esper_fx.seed import KasminaSeed

logger = logging.getLogger(__name__)

_numbers = itertools.count(1)
_warned: set[str] = set()


class SizedProgram:
    """A program for fixed sizes or for all that its kernels take, with its plans and what it runs now.

    Args:
        program: What it is a program of.
        args: What that is called with.
        eager: Whether it is to run eagerly only.
        vary: Whether it is for all sizes.

    Raises:
        SizesError: It cannot be for all sizes.
        Exception: It could not be compiled for all sizes. One for fixed sizes runs eagerly then.

    Attributes:
        active: What the next step runs.
        plan: Name of the plan in use: ``whole``, ``blocks`` or ``eager``.
        number: Counts up in the process, in the order of first calls.
        measuring: What runs in the steps that are measured.
        varies: Whether it is for all sizes that its kernels take.
    """

    def __init__(self, program: Program, args: Sequence[Any], *, eager: bool = False, vary: bool = False) -> None:
        self.number = next(_numbers)
        self.service: Service = service()
        self.growths = program.growths
        self._module = program.module
        self._running: Prepared | None = None
        self._made: Prepared | None = None  # set by any thread, so it is read once and then looked at
        self._slots: list[tuple[KasminaSeed, Slot]] = []
        self.active: Any = self._run_eagerly
        self.plan = "eager"
        self.layout: Layout | None = None
        #: Whether a call's inputs share memory that it changes; None where it changes none that could be shared.
        self.aliased: Callable[[Sequence[Any]], bool] | None = None
        self.seeds: list[KasminaSeed] = []
        self._pins = Pins(self.service)  # what runs
        self._wanted = Pins(self.service)  # what was asked for, last after so many switches:
        self._wanted_after = 0
        self._switches = 0
        self.measuring = Measuring(self.service)
        self.varies = vary
        #: Whether there is something that it cannot do for all sizes at once: then each has to have a program of its own.
        self.retired = False
        self._retiring: SizesError | None = None  # what that is, from when it is known until the next boundary
        if not eager:
            try:
                with _torch.saved_tensors_kept():
                    self._compile(args)
            except SiteError:
                raise  # what the user must change is told, as in eager mode
            except Exception as error:
                if vary:
                    raise
                self._give_up(error)

    def _compile(self, args: Sequence[Any]) -> None:
        _torch.warm_inductor()
        self.service.start_workers()
        ambient = Ambient.current()
        self.layout = Layout(
            self._module,
            args,
            ambient,
            blocks=settings().blocks and self.service.compiler is not None,
            vary=self.varies,
        )
        by_handle = {growth.handle: growth for growth in self.growths}
        self.seeds = [by_handle[slot.model].by_index[slot.site] for slot in self.layout.slots]
        self._slots = list(zip(self.seeds, self.layout.slots, strict=True))
        for seed, slot in self._slots:
            source = examples(slot.source.shape) if slot.source is not None else None
            seed.note_value(examples(slot.value.shape), slot.value.dtype, slot.value.device, source)
        self.aliased = aliasing.check(self.layout.changed_inputs, args)
        if not self.layout.plans:  # nothing is computed: inputs and constants are handed through
            self.layout = None
            return
        self._obtain({seed for seed in self.seeds if seed.live})

    def _obtain(self, live: set[KasminaSeed]) -> bool:
        """Get the kernels of the best plan for these bodies, now, and switch to it."""
        assert self.layout is not None
        variants = self.layout.variants(self.layout.plans[0], self.assignment(live)) or []
        self._pins.replace(variants)
        for variant in variants:
            self.service.obtain(variant.key, variant.compile_here)
        return self.activate(live)

    def renew(self, args: Sequence[Any]) -> Any:
        """Run with bodies whose tensors are of other kinds now: eagerly, unless or until there are kernels for them."""
        live = {seed for seed in self.seeds if seed.live}
        self._running = self._made = None
        switched = self.activate(live)
        if not switched:
            self.run_eagerly()
        for growth in self.growths:
            if not switched or growth.sampler is not None:  # what measures does not fit either
                growth.changes.kick()
        active = self.active
        return active(args) if self.takes(args, active) else self._module(*args)

    def run_eagerly(self) -> None:
        """Run eagerly until :meth:`activate` finds kernels for what is live."""
        self._running = self._made = None
        self.active, self.plan = self._run_eagerly, "eager"
        self._pins.replace([])

    def _retire(self, error: BaseException) -> None:
        """Leave all sizes to programs of their own; between two steps."""
        self.retired, self._retiring = True, None
        self._drop()
        logger.info("a program is compiled for each of its sizes from now on: %s", error)

    def _drop(self) -> None:
        self.layout = None
        self.run_eagerly()
        self._wanted.replace([])
        self.measuring.drop()

    def _give_up(self, error: BaseException) -> None:
        self._drop()
        logger.debug("compilation failed", exc_info=error)
        warn_once(
            f"a program runs eagerly because it could not be compiled: {type(error).__name__}: {error}. "
            "`esper-fx doctor` checks the machine."
        )

    def _run_eagerly(self, args: Sequence[Any]) -> Any:
        return self._module(*args)

    def takes(self, args: Sequence[Any], executable: Any = None) -> bool:
        """Whether what runs now, or ``executable``, is right for the sizes of these inputs; always where these are fixed."""
        if not self.varies:
            return True
        running = self.active if executable is None else executable
        return not self.retired and (not isinstance(running, Executable) or running.takes(args))

    def assignment(self, live: set[KasminaSeed]) -> Assignment:
        """For each slot the body of its seed if that is among ``live``; records bodies that are new."""
        return tuple(record_once(seed, slot) if seed in live else None for seed, slot in self._slots)

    def _known_assignment(self, live: set[KasminaSeed]) -> Assignment | None:
        """The same if all bodies have been recorded already. Fast."""
        bodies = []
        for seed, slot in self._slots:
            body = known_record(seed, slot) if seed in live else None
            if body is None and seed in live:
                return None
            bodies.append(body)
        return tuple(bodies)

    def _best(self, live: set[KasminaSeed]) -> tuple[Plan, list[Variant]] | None:
        """The best plan whose kernels for these bodies are all in memory. Makes nothing new; fast."""
        return next(((plan, variants) for plan, variants, _ in self._ready(live)), None)

    def _ready(self, live: set[KasminaSeed]) -> Iterator[tuple[Plan, list[Variant], Assignment]]:
        """The plans whose kernels for these bodies are all in memory, the best first. Makes nothing new; fast."""
        assignment, layout = self._known_assignment(live), self.layout  # read once: it may be dropped meanwhile
        if layout is None or assignment is None:
            return
        for plan in layout.plans:
            variants = layout.variants(plan, assignment, known=True)
            if variants is not None and all(self.has_kernel(variant) for variant in variants):
                yield plan, variants, assignment

    def has_kernel(self, variant: Variant) -> bool:
        return self.service.compiler is None or variant.key in self.service.cache

    def kernel(self, variant: Variant) -> Any:
        """The kernel if it is in memory. Without worker processes a graph can stand for its kernel: it runs eagerly."""
        kernel = self.service.cache.get(variant.key)
        return variant.module if kernel is None and self.service.compiler is None else kernel

    def make(self, live: set[KasminaSeed]) -> Prepared | None:
        """What runs these bodies best, if its kernels are in memory; that of now, if that is it."""
        bodies = self.bodies(live)  # before anything else reads a body: one that is new then fits no more
        ready = list(self._ready(live))
        if not ready:
            return None
        plan, variants, assignment = ready[0]
        layout = self.layout
        complete = layout is not None and len(ready) == len(layout.plans)
        now = self._running
        if now is not None and now.plan == plan.name and now.has(bodies):
            return now if now.complete == complete else replace(now, complete=complete)
        kernels = [self.kernel(variant) for variant in variants]
        if None in kernels:  # the cache has dropped one meanwhile
            return None
        seeds = [seed if seed in live else None for seed in self.seeds]
        executable = Executable(plan, kernels, seeds, assignment)
        return Prepared(plan.name, bodies, tuple(variants), executable, complete)

    def offer(self, made: Prepared | None) -> None:
        """Keep what was made for the next boundary, which takes it if its bodies are live then; None: forget it."""
        self._made = made

    def can_run(self, live: set[KasminaSeed]) -> bool:
        """Whether ``activate`` would succeed."""
        made = self._made
        if self._retiring is not None:
            return True
        return self.layout is None or (made is not None and made.has(self.bodies(live))) or self._best(live) is not None

    def has_better(self, live: set[KasminaSeed]) -> bool:
        """Whether ``activate`` would switch; keeps what to."""
        made = self.make(live)
        if made is None or self._runs(made):
            return False
        self.offer(made)
        return True

    def activate(self, live: set[KasminaSeed]) -> bool:
        """Switch to what was made for these bodies, or else is the best; returns whether it runs another now."""
        if self._retiring is not None:
            self._retire(self._retiring)
            return True
        made, self._made = self._made, None
        if made is None or not made.has(self.bodies(live)):
            made = self.make(live)
        if made is None:
            return False
        switches = not self._runs(made)
        if switches:
            self._pins.replace(made.variants)
            self._switches += 1
            self.active = made.executable
            self.plan = made.plan
        self._running = made
        return switches

    def _runs(self, made: Prepared) -> bool:
        return self._running is not None and made.executable is self._running.executable

    @property
    def running(self) -> Prepared | None:
        """What runs now, whole even where another thread switches meanwhile; None where the program runs eagerly."""
        return self._running

    @property
    def complete(self) -> bool:
        """Whether nothing is left to get ready for what runs now."""
        return self.layout is None or (self._running is not None and self._running.complete)

    def restore(self, live: set[KasminaSeed]) -> bool:
        """Run with these bodies from now on, whatever ran before: with the best plan that is ready, or else compile.

        Blocks. Where that fails, the program runs eagerly. Returns whether it runs something else than before.
        """
        if self.layout is None:
            return False
        try:
            with _torch.saved_tensors_kept():
                return self.activate(live) if self._best(live) is not None else self._obtain(live)
        except Exception as error:
            (self._retire if self.varies else self._give_up)(error)
            return True

    def bodies(self, live: set[KasminaSeed]) -> tuple[nn.Module | None, ...]:
        return tuple(seed.body if seed in live else None for seed in self.seeds)

    def request(self, live: set[KasminaSeed], *, urgent: bool, retry: bool) -> list[Variant]:
        """Ask for the kernels that are missing to run with these bodies. Not for the training thread.

        Args:
            live: The seeds that have a body.
            urgent: Ask for one plan only, the one that is ready first; otherwise for all plans.
            retry: Ask again for kernels that have failed.

        Returns:
            The variants that still lack a kernel, each with a ``future`` or an ``error``; nothing where ``urgent`` and
            some plan is ready.
        """
        layout = self.layout  # read once: the thread that runs the model may drop it meanwhile
        if layout is None:
            return []
        try:
            assignment = self.assignment(live)
        except BodyGoneError:  # what is wanted now is asked for in another round
            return []
        except SizesError as error:
            self._retiring = error
            return []
        plans = layout.plans[-1:] if urgent else reversed(layout.plans)  # what is built quickly first
        wanted = [variant for plan in plans for variant in layout.variants(plan, assignment) or ()]
        if urgent and (all(map(self.has_kernel, wanted)) or self._best(live) is not None):
            return []
        self._want(wanted, also=urgent)
        missing = [variant for variant in wanted if not self.has_kernel(variant)]
        for variant in missing:
            variant.request(self.service, priority=0 if urgent else 10, retry=retry)
        return [variant for variant in missing if not self.has_kernel(variant)]

    def _want(self, variants: list[Variant], *, also: bool) -> None:
        """Have the cache keep these kernels until they run, or else the first to come may be gone when the last comes.

        Args:
            variants: What the kernels are of.
            also: Besides those that were wanted before, unless it has switched since.
        """
        before = self._wanted.variants if also and self._wanted_after == self._switches else []
        self._wanted_after = self._switches
        self._wanted.replace([*before, *variants])


def warn_once(message: str) -> None:
    """Log a warning, unless this process has done so."""
    if message not in _warned:
        _warned.add(message)
        logger.warning("%s", message)
