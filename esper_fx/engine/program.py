"""A program: what one Dynamo graph becomes. It runs the best executable there is and switches at a step boundary."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from esper_fx import _torch, ops
from esper_fx.cache import KernelCache
from esper_fx.cache._background import ForkSafeLock
from esper_fx.engine import aliasing
from esper_fx.engine.bodies import known_record, record_once
from esper_fx.engine.build import Ambient
from esper_fx.engine.plan import Assignment, Executable, Layout, Plan, Slot, StaleError
from esper_fx.engine.probes import ProbedKernel, Sampler
from esper_fx.engine.region import Variant
from esper_fx.engine.service import Service, service
from esper_fx.errors import SiteError
from esper_fx.passes.propagate import is_seed
from esper_fx.settings import settings

if TYPE_CHECKING:
    from esper_fx.growth import Growth
    from esper_fx.seed import KasminaSeed

logger = logging.getLogger(__name__)

#: A graph with symbolic sizes is compiled for at most this many combinations of sizes; further ones run eagerly.
MAX_SIZES = 8

_warned: set[str] = set()


class Program:
    """A Dynamo graph, for whatever sizes it is called with.

    Attributes:
        growths: The morphable models whose seeds are in the graph.
        epochs: For each growth, by its handle, the step in which the program ran last.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        handles = [node.args[3] for node in module.graph.nodes if is_seed(node)]
        self.growths: list[Growth] = [ops.hosts[handle] for handle in dict.fromkeys(handles)]  # type: ignore[misc]
        self.epochs = dict.fromkeys(handles, -1)
        self._sized: dict[tuple[int, ...], SizedProgram] = {}
        self._rest: SizedProgram | None = None  # for all sizes that have none of their own, once no more get one
        self._integers = tuple(
            i for i, node in enumerate(n for n in module.graph.nodes if n.op == "placeholder") if not _is_tensor(node)
        )
        self._lock = ForkSafeLock()
        self._nested = _has_nested_seeds(module)

    def __call__(self, *args: Any) -> Any:
        started = time.perf_counter()
        if not _torch.in_backward():  # where checkpointing runs a forward pass again: with what it ran with before
            for growth in self.growths:
                growth.changes.enter(self)
        sizes = tuple(args[i] for i in self._integers)
        sized = self._sized.get(sizes, self._rest)
        if sized is None:
            with self._lock:
                sized = self._sized.get(sizes, self._rest) or self._first_call(sizes, args)
            started = time.perf_counter()  # what a first call takes is no part of a step
        executable = sized.sampled() if self._sampling() else sized.active
        host = time.perf_counter() - started
        for growth in self.growths:
            growth.changes.count_host_time(host)
        if sized.aliased is not None and sized.aliased(args):
            _warn_once("a call runs eagerly because an input that it changes in place shares memory with another one")
            return self.module(*args)
        try:
            return executable(args)
        except StaleError:
            return sized.renew(args)

    def _sampling(self) -> bool:
        """Whether this call is to be measured."""
        if all(growth.sampler is None or not growth.sampler.sampling for growth in self.growths):
            return False
        return not _torch.may_be_repeated()

    def _first_call(self, sizes: tuple[int, ...], args: Sequence[Any]) -> SizedProgram:
        if self._nested or len(self._sized) >= MAX_SIZES:
            reason = "its seeds sit in a nested graph" if self._nested else f"it was called with over {MAX_SIZES} sizes"
            _warn_once(f"a program runs eagerly because {reason}")
            sized = self._rest = SizedProgram(self, args, eager=True)
        else:
            sized = self._sized[sizes] = SizedProgram(self, args, eager=False)
        for growth in self.growths:
            growth.changes.programs.add(sized)
            growth.changes.kick()
        return sized


@dataclass(frozen=True, eq=False)
class Running:
    """What a program runs, or will; made beside the training, so that a step boundary only has to put it in its place.

    Attributes:
        plan: Name of the plan.
        bodies: For each seed of the program its body, or None.
        variants: What its kernels are of.
        executable: What a step calls.
        complete: Whether the kernels of all plans for these bodies were there, so that there is nothing left to ask for.
    """

    plan: str
    bodies: tuple[nn.Module | None, ...]
    variants: tuple[Variant, ...]
    executable: Executable
    complete: bool

    def has(self, bodies: Sequence[nn.Module | None]) -> bool:
        """Whether it is made for these bodies, as they are now."""
        return len(bodies) == len(self.bodies) and all(map(is_, bodies, self.bodies)) and self.executable.current


class SizedProgram:
    """A program for fixed sizes, with its plans and what it runs now.

    Attributes:
        active: What the next step runs.
        plan: Name of the plan in use: ``whole``, ``blocks`` or ``eager``.
    """

    def __init__(self, program: Program, args: Sequence[Any], *, eager: bool) -> None:
        self.service: Service = service()
        self.growths = program.growths
        self._module = program.module
        self._running: Running | None = None
        self._made: Running | None = None  # set by any thread, so it is read once and then looked at
        self._slots: list[tuple[KasminaSeed, Slot]] = []
        self.active: Any = self._run_eagerly
        self.plan = "eager"
        self.layout: Layout | None = None
        #: Whether a call's inputs share memory that it changes; None where it changes none that could be shared.
        self.aliased: Callable[[Sequence[Any]], bool] | None = None
        self.seeds: list[KasminaSeed] = []
        self._pins = _Pins(self.service)  # what runs
        self._wanted = _Pins(self.service)  # what was asked for, last after so many switches:
        self._wanted_after = 0
        self._switches = 0
        self._probed: tuple[Sampler, Running] | None = None  # the same with probes, and who takes what they measure
        self._probe_pins = _Pins(self.service)
        if not eager:
            try:
                with _torch.saved_tensors_kept():
                    self._compile(args)
            except SiteError:
                raise  # what the user must change is told, as in eager mode
            except Exception as error:
                self._give_up(error)

    def _compile(self, args: Sequence[Any]) -> None:
        _torch.warm_inductor()
        self.service.start_workers()
        ambient = Ambient.current()
        self.layout = Layout(
            self._module, args, ambient, blocks=settings().blocks and self.service.compiler is not None
        )
        by_handle = {growth.handle: growth for growth in self.growths}
        self.seeds = [by_handle[slot.model].by_index[slot.site] for slot in self.layout.slots]
        self._slots = list(zip(self.seeds, self.layout.slots, strict=True))
        for seed, slot in self._slots:
            source = slot.source.shape if slot.source is not None else None
            seed.note_value(slot.value.shape, slot.value.dtype, slot.value.device, source)
        self.aliased = aliasing.check(self.layout.changed_inputs, args)
        if not self.layout.plans:  # nothing is computed: inputs and constants are handed through
            self.layout = None
            return
        self._obtain({seed for seed in self.seeds if seed.live})

    def _obtain(self, live: set[KasminaSeed]) -> bool:
        """Get the kernels of the best plan for these bodies, now, and switch to it."""
        assert self.layout is not None
        variants = self.layout.variants(self.layout.plans[0], self._assignment(live)) or []
        self._pins.replace(variants)
        for variant in variants:
            self.service.obtain(variant.key, variant.compile_here)
        return self.activate(live)

    def renew(self, args: Sequence[Any]) -> Any:
        """Run with bodies whose tensors are of other kinds now: eagerly, unless or until there are kernels for them."""
        live = {seed for seed in self.seeds if seed.live}
        self._running = self._made = None
        if not self.activate(live):
            self.active, self.plan = self._run_eagerly, "eager"
            self._pins.replace([])
            for growth in self.growths:
                growth.changes.kick()
        return self.active(args)

    def _give_up(self, error: BaseException) -> None:
        self.layout = None
        self.active = self._run_eagerly
        self.plan = "eager"
        self._running = self._made = None
        self._pins.replace([])
        self._wanted.replace([])
        logger.debug("compilation failed", exc_info=error)
        _warn_once(
            f"a program runs eagerly because it could not be compiled: {type(error).__name__}: {error}. "
            "`esper-fx doctor` checks the machine."
        )

    def _run_eagerly(self, args: Sequence[Any]) -> Any:
        return self._module(*args)

    def _assignment(self, live: set[KasminaSeed]) -> Assignment:
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
        assignment = self._known_assignment(live)
        if self.layout is None or assignment is None:
            return
        for plan in self.layout.plans:
            variants = self.layout.variants(plan, assignment, known=True)
            if variants is not None and all(self._has_kernel(variant) for variant in variants):
                yield plan, variants, assignment

    def _has_kernel(self, variant: Variant) -> bool:
        return self.service.compiler is None or variant.key in self.service.cache

    def _kernel(self, variant: Variant) -> Any:
        """The kernel if it is in memory. Without worker processes a graph can stand for its kernel: it runs eagerly."""
        kernel = self.service.cache.get(variant.key)
        return variant.module if kernel is None and self.service.compiler is None else kernel

    def make(self, live: set[KasminaSeed]) -> Running | None:
        """What runs these bodies best, if its kernels are in memory; that of now, if that is it."""
        bodies = self._bodies(live)  # before anything else reads a body: one that is new then fits no more
        ready = list(self._ready(live))
        if not ready:
            return None
        plan, variants, assignment = ready[0]
        complete = self.layout is not None and len(ready) == len(self.layout.plans)
        now = self._running
        if now is not None and now.plan == plan.name and now.has(bodies):
            return now if now.complete == complete else replace(now, complete=complete)
        kernels = [self._kernel(variant) for variant in variants]
        if None in kernels:  # the cache has dropped one meanwhile
            return None
        seeds = [seed if seed in live else None for seed in self.seeds]
        executable = Executable(plan, kernels, seeds, assignment)
        return Running(plan.name, bodies, tuple(variants), executable, complete)

    def offer(self, made: Running | None) -> None:
        """Keep what was made for the next boundary, which takes it if its bodies are live then; None: forget it."""
        self._made = made

    def can_run(self, live: set[KasminaSeed]) -> bool:
        """Whether ``activate`` would succeed."""
        made = self._made
        return (
            self.layout is None or (made is not None and made.has(self._bodies(live))) or self._best(live) is not None
        )

    def has_better(self, live: set[KasminaSeed]) -> bool:
        """Whether ``activate`` would switch; keeps what to."""
        made = self.make(live)
        if made is None or self._runs(made):
            return False
        self.offer(made)
        return True

    def activate(self, live: set[KasminaSeed]) -> bool:
        """Switch to what was made for these bodies, or else is the best; returns whether it runs another now."""
        made, self._made = self._made, None
        if made is None or not made.has(self._bodies(live)):
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

    def _runs(self, made: Running) -> bool:
        return self._running is not None and made.executable is self._running.executable

    def sampled(self) -> Any:
        """What a step that is to be measured runs: with probes where there are kernels with probes for what runs now."""
        running = self._running
        probed = None if running is None else self._probes_for(running.bodies)
        return self.active if probed is None else probed.executable

    def _probes_for(self, bodies: Sequence[nn.Module | None]) -> Running | None:
        """What runs these bodies with probes, for who watches the model now."""
        probed = self._probed
        return probed[1] if probed is not None and probed[0] is self._sampler and probed[1].has(bodies) else None

    @property
    def _sampler(self) -> Sampler | None:
        """Who watches the model; with several models in a program it could not be told whose step it is."""
        return self.growths[0].sampler if len(self.growths) == 1 else None

    def prepare_probes(self, live: set[KasminaSeed]) -> list[Variant]:
        """Get ready what steps that are to be measured run; by the plan of which least has to be compiled.

        Not for the training thread.

        Returns:
            The variants that still lack a kernel, each with a ``future`` or an ``error``.
        """
        sampler, bodies = self._sampler, self._bodies(live)
        if self.layout is None or not self.layout.plans or sampler is None or self._probes_for(bodies) is not None:
            return []
        plan, assignment = self.layout.plans[-1], self._assignment(live)
        probes = self.layout.probes(plan, sampler.directions, [seed.site.feature_dim for seed in self.seeds])
        variants = self.layout.variants(plan, assignment, probes=probes) or []
        self._probe_pins.replace(variants)
        for variant in variants:
            if not self._has_kernel(variant):
                variant.request(self.service, priority=20, retry=False)
        missing = [variant for variant in variants if not self._has_kernel(variant)]
        kernels = [self._kernel(variant) for variant in variants]
        if not missing and None not in kernels:
            for i, (variant, region) in enumerate(zip(variants, plan.regions, strict=True)):
                sites = [self.layout.slots[slot].site for slot in region.slots]
                own, place = probes[i], len(region.inputs)
                if own is not None:
                    kernels[i] = ProbedKernel(kernels[i], own, variant.leaves, place, sites, sampler)
            seeds = [seed if seed in live else None for seed in self.seeds]
            executable = Executable(plan, kernels, seeds, assignment)
            self._probed = sampler, Running(plan.name, bodies, tuple(variants), executable, complete=True)
        return missing

    def drop_probes(self) -> None:
        """Forget what runs steps that are to be measured."""
        self._probed = None
        self._probe_pins.replace([])

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
            self._give_up(error)
            return True

    def _bodies(self, live: set[KasminaSeed]) -> tuple[nn.Module | None, ...]:
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
        if self.layout is None:
            return []
        assignment = self._assignment(live)
        plans = self.layout.plans[-1:] if urgent else reversed(self.layout.plans)  # what is built quickly first
        wanted = [variant for plan in plans for variant in self.layout.variants(plan, assignment) or ()]
        if urgent and (all(map(self._has_kernel, wanted)) or self._best(live) is not None):
            return []
        self._want(wanted, also=urgent)
        missing = [variant for variant in wanted if not self._has_kernel(variant)]
        for variant in missing:
            variant.request(self.service, priority=0 if urgent else 10, retry=retry)
        return [variant for variant in missing if not self._has_kernel(variant)]

    def _want(self, variants: list[Variant], *, also: bool) -> None:
        """Have the cache keep these kernels until they run, or else the first to come may be gone when the last comes.

        Args:
            variants: What the kernels are of.
            also: Besides those that were wanted before, unless it has switched since.
        """
        before = self._wanted.variants if also and self._wanted_after == self._switches else []
        self._wanted_after = self._switches
        self._wanted.replace([*before, *variants])


class _Pins:
    """Variants whose kernels a program keeps in the cache; given back when it goes.

    Attributes:
        variants: Those, each once.
    """

    def __init__(self, owner: Service) -> None:
        self.variants: list[Variant] = []
        self._cache = owner.cache
        self._lock = ForkSafeLock()
        weakref.finalize(self, _unpin, self._cache, self.variants)

    def replace(self, variants: Sequence[Variant]) -> None:
        """Keep these from now on, and no others."""
        with self._lock:
            new, old = list(dict.fromkeys(variants)), list(self.variants)
            for variant in new:
                self._cache.pin(variant.key)
            self.variants[:] = new
        _unpin(self._cache, old)


def _unpin(cache: KernelCache, variants: list[Variant]) -> None:
    for variant in variants:
        cache.unpin(variant.key)


def _is_tensor(placeholder: fx.Node) -> bool:
    return isinstance(placeholder.meta.get("example_value"), torch.Tensor)


def _has_nested_seeds(module: fx.GraphModule) -> bool:
    return any(
        is_seed(node)
        for child in module.modules()
        if child is not module and isinstance(child, fx.GraphModule)
        for node in child.graph.nodes
    )


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning("%s", message)
