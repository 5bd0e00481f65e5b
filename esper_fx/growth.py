"""Growth: what happens to the seeds of one model, when, and what the engine must get ready for it."""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from esper_fx import blueprints, ops
from esper_fx.conductor import Conductor
from esper_fx.errors import BlueprintError, GerminationError
from esper_fx.lifecycle import GrowthEvent, Ledger, Stage, check_transition
from esper_fx.seed import Germination, KasminaSeed
from esper_fx.settings import settings
from esper_fx.site import SiteSpec
from esper_fx.state import KasminaStateLayout

if TYPE_CHECKING:
    from esper_fx.engine.program import Program, SizedProgram
    from esper_fx.engine.region import Variant
    from esper_fx.optim import Attachment

logger = logging.getLogger(__name__)

_handles = itertools.count(1)


@dataclass(frozen=True)
class Morphology:
    """Which seeds have a body, and which: site to blueprint and its parameters. Immutable and hashable."""

    bodies: frozenset[tuple[str, str, Any]] = frozenset()

    def __len__(self) -> int:
        return len(self.bodies)

    def __str__(self) -> str:
        rows = sorted((site, blueprint) for site, blueprint, _ in self.bodies)
        return "{" + ", ".join(f"{site}: {blueprint}" for site, blueprint in rows) + "}"


@dataclass(frozen=True, eq=False)
class Order:
    """A germination that is asked for; see :meth:`KasminaSeed.germinate`.

    Attributes:
        trainable: Whether the body's parameters get gradients.
    """

    seed: KasminaSeed
    blueprint: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor] | None = None
    alpha: float | None = None
    trainable: bool = True


@dataclass(eq=False)
class _Change:
    """A change of the morphology that is on its way: a seed's body comes (with its germination) or goes.

    Changes of one group go live in one step, or fail, together; they stand next to each other in the queue.
    """

    seed: KasminaSeed
    germination: Germination | None
    target: Stage
    error: BaseException | None = None
    ready: bool = False
    tried: bool = False
    group: object = field(default_factory=object)


class Growth:
    """The life of one model's seeds.

    Every transition goes through here. Changes of the morphology are queued; the conductor, a coroutine on the engine's
    thread, gets their kernels ready; a step boundary on the training thread makes them live.

    Attributes:
        handle: Number of the model within the process.
        state: The state arrays.
        seeds: The seeds by site.
        by_index: The same by their row in the state arrays.
        ledger: What has happened.
        clock: Training steps seen: steps of the attached optimizer, or forward calls where there is none.
        programs: The compiled programs that run the model.
        scheduled: Whether an alpha is on its way.
    """

    def __init__(self, state: KasminaStateLayout, seed: int) -> None:
        self.state = state
        self.model_seed = seed
        self.seeds: dict[str, KasminaSeed] = {}
        self.by_index: list[KasminaSeed] = []
        self.ledger = Ledger()
        self.clock = 0
        self._begin()

    def _begin(self) -> None:
        self.handle = next(_handles)
        ops.hosts[self.handle] = self
        self.lock = threading.RLock()
        self.programs: weakref.WeakSet[SizedProgram] = weakref.WeakSet()
        self.attachment: Attachment | None = None
        self.scheduled = True  # until a tick has looked
        self.epoch = 0
        self.recompiles = 0
        self.swaps = 0
        self.longest_host = 0.0
        self._host = 0.0
        self._pending: list[_Change] = []
        self._boundary_work = False
        self._unfinished = False
        self._thread: int | None = None
        self._conductor = Conductor(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("state", "model_seed", "seeds", "by_index", "ledger", "clock")}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__dict__.update(saved)
        self._begin()
        self._unfinished = True

    def _finish_copy(self) -> None:
        """A copy of a model takes over the changes that were on their way in the original."""
        self._unfinished = False
        for seed in self.by_index:
            if seed.stage == Stage.GERMINATING:
                self._enqueue(_Change(seed, Germination(seed), Stage.INCUBATING))
            elif seed.stage == Stage.EMBARGOED and seed.live:
                self._enqueue(_Change(seed, None, Stage.EMBARGOED))

    # Transitions, asked for by the user.

    def germinate(
        self,
        seed: KasminaSeed,
        blueprint: str,
        *,
        weights: Mapping[str, Tensor] | None,
        alpha: float | None,
        config: Mapping[str, Any],
    ) -> Germination:
        """See :meth:`KasminaSeed.germinate`."""
        (germination,) = self.germinate_together([Order(seed, blueprint, config, weights, alpha)])
        return germination

    def germinate_together(self, orders: Sequence[Order]) -> list[Germination]:
        """Germinate several seeds, of which all go live in one step or, where one cannot, none.

        Raises:
            EsperError: As for one seed; nothing has changed then, at any of them.
        """
        started = time.perf_counter()
        with self.lock:
            bodies = [self._build_body(order) for order in orders]
            group = object()
            changes = []
            for order, body in zip(orders, bodies, strict=True):
                target = Stage.INCUBATING if order.weights is None else Stage.ACTIVE
                self._plant(order, body, target)
                changes.append(_Change(order.seed, Germination(order.seed), target, group=group))
            self._enqueue(*changes)
        self._host += time.perf_counter() - started
        return [change.germination for change in changes if change.germination is not None]

    def _build_body(self, order: Order) -> nn.Module:
        """The body that is asked for; changes nothing."""
        seed, config = order.seed, order.config
        check_transition(seed.name, seed.stage, Stage.GERMINATING)
        kind = blueprints.get(order.blueprint)
        site = seed.site
        reason = kind.fits(site)
        if reason is not None:
            fitting = ", ".join(seed.fits()) or "none"
            raise BlueprintError(
                f"blueprint {order.blueprint!r} does not fit site {seed.name!r}: {reason}. It fits: {fitting}"
            )
        number = int(self.state.read("germinations", seed.index))
        body = kind.build(site, config, seed=_body_seed(self.model_seed, seed.name, number))
        _validate_once(kind, body, site, config)
        if order.weights is not None:
            _load_weights(body, order.weights, order.blueprint, seed.name)
        if not order.trainable:
            body.requires_grad_(False)
        return body

    def _plant(self, order: Order, body: nn.Module, target: Stage) -> None:
        seed, alpha = order.seed, order.alpha
        body.train(seed.training)
        if alpha is None:
            alpha = 1.0 if order.weights is not None else settings().incubation_alpha
        number = int(self.state.read("germinations", seed.index))
        self.state.write(seed.index, alpha=alpha, gate=float(target is Stage.ACTIVE), germinations=number + 1)
        seed.set_body(body, order.blueprint, blueprints.get(order.blueprint).bind(order.config))
        seed.error = None
        self._move(seed, Stage.GERMINATING, f"germinated as {order.blueprint}")
        if self.attachment is not None:
            self.attachment.join(seed)

    def blend(self, seed: KasminaSeed, *, to: float, steps: int, schedule: str) -> None:
        """See :meth:`KasminaSeed.blend`."""
        with self.lock:
            check_transition(seed.name, seed.stage, Stage.BLENDING)
            self.state.schedule_alpha(seed.index, to=to, steps=steps, schedule=schedule, now=self.clock)
            self.state.write(seed.index, gate=1.0)
            self._move(seed, Stage.BLENDING, f"blending to {to:g} within {steps} steps ({schedule})")
            self.scheduled = True

    def fossilize(self, seed: KasminaSeed) -> None:
        """See :meth:`KasminaSeed.fossilize`."""
        with self.lock:
            check_transition(seed.name, seed.stage, Stage.FOSSILIZED)
            self._move(seed, Stage.FOSSILIZED, "kept by the user")

    def prune(self, seed: KasminaSeed, why: str) -> None:
        """See :meth:`KasminaSeed.prune`."""
        self.prune_together([seed], why)

    def prune_together(self, seeds: Sequence[KasminaSeed], why: str, *, embargo_steps: int | None = None) -> None:
        """Silence several seeds at once; their bodies go in one step, so that no kernel is needed for part of them.

        Args:
            seeds: Each once.
            why: For the ledger.
            embargo_steps: Clock ticks that their sites stay closed. Default: as in the settings.

        Raises:
            LifecycleError: One of them cannot be pruned; nothing has changed then, at any of them.
        """
        started = time.perf_counter()
        steps = settings().embargo_steps if embargo_steps is None else embargo_steps
        with self.lock:
            for seed in seeds:
                check_transition(seed.name, seed.stage, Stage.EMBARGOED)
            group = object()
            self._enqueue(
                *[_Change(s, None, Stage.EMBARGOED, group=group) for s in seeds if self._embargo(s, why, steps)]
            )
        self._host += time.perf_counter() - started

    def fail(self, seed: KasminaSeed, error: BaseException) -> None:
        """Quarantine a seed: ERROR, then EMBARGOED; alpha is 0 at once and the body goes."""
        with self.lock:
            seed.error = error
            count = int(self.state.read("error_count", seed.index))
            self.state.write(seed.index, alpha=0.0, gate=0.0, error_count=count + 1)
            self._move(seed, Stage.ERROR, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            if self._embargo(seed, "quarantined after an error", settings().embargo_steps):
                self._enqueue(_Change(seed, None, Stage.EMBARGOED))

    def _embargo(self, seed: KasminaSeed, why: str, steps: int) -> bool:
        """Silence a seed and close its site; returns whether it has a live body, which must then go at a step boundary."""
        coming = next((c for c in self._pending if c.seed is seed), None)
        self.state.write(seed.index, alpha=0.0, gate=0.0, embargo_until=self.clock + steps)
        self._move(seed, Stage.EMBARGOED, why)
        if self.attachment is not None:
            self.attachment.leave(seed)
        if coming is not None:
            self._pending.remove(coming)
            if coming.germination is not None:
                error = seed.error or GerminationError(f"site {seed.name!r} was pruned before its body was live")
                coming.germination.settle(error)
        if not seed.live:
            seed.set_body(None, None, {})
            self._release(self.clock)
        return seed.live

    def _move(self, seed: KasminaSeed, to: Stage, why: str) -> None:
        frm = seed.stage
        check_transition(seed.name, frm, to)
        self.state.write(seed.index, stage=int(to), stage_since=self.clock)
        self.ledger.append(GrowthEvent(self.clock, seed.name, frm, to, why, seed.blueprint))

    # Time.

    def tick(self) -> None:
        """One clock tick: alphas advance, blends end, embargoes run out."""
        self.clock += 1
        ended = self.state.advance(self.clock)
        if ended or self.scheduled:
            with self.lock:
                for index in ended:
                    seed = self.by_index[index]
                    if seed.stage == Stage.BLENDING:
                        self._move(seed, Stage.ACTIVE, f"alpha has reached {seed.alpha:g}")
                self.scheduled = any(seed.stage == Stage.BLENDING for seed in self.by_index)
        self._release(self.clock)

    def _release(self, now: int) -> None:
        for index in self.state.expired_embargoes(now):
            with self.lock:
                seed = self.by_index[index]
                if seed.body is None:
                    self._move(seed, Stage.DORMANT, "the embargo is over")

    # Step boundaries, on the thread that runs the model.

    def enter(self, program: Program) -> None:
        """A program is about to run: a step begins if it has run in this step already."""
        self._thread = threading.get_ident()
        if program.epochs[self.handle] == self.epoch:
            self.epoch += 1
            self.begin_step()
        program.epochs[self.handle] = self.epoch

    def begin_step(self) -> None:
        """A step boundary: make live what is ready, and let the clock tick where no optimizer does."""
        self.longest_host = max(self.longest_host, self._host)
        self._host = 0.0
        started = time.perf_counter()
        if self._unfinished:
            self._finish_copy()
        if self._boundary_work:
            self.apply()
        if self.attachment is None:
            self.tick()
        self._host += time.perf_counter() - started

    def begin_eager_forward(self) -> None:
        """The model is called without a compiled program."""
        self._thread = threading.get_ident()
        self.begin_step()

    def reset_stats(self) -> None:
        """Begin to count anew."""
        self.recompiles = self.swaps = 0
        self.longest_host = self._host = 0.0

    def count_host_time(self, seconds: float) -> None:
        """Time that the engine itself took on the training thread in this step."""
        self._host += seconds

    def apply_between_steps(self) -> None:
        """Make live what is ready if the calling thread is the one that runs the model."""
        if self._thread is None or self._thread == threading.get_ident():
            self.apply()

    def apply(self) -> None:
        """Make live what is ready; the calling thread must be between two steps."""
        with self.lock:
            self._boundary_work = False
            while self._pending and self._pending[0].ready:
                change = self._pending[0]
                together = self._together_with(change)
                if change.error is None and not self._can_run(self._live_after(change)):
                    for member in together:
                        member.ready = False  # a program has come meanwhile
                    break
                del self._pending[: len(together)]
                for member in together:
                    self._commit(member)
            live = self._live()
            self.swaps += sum(program.activate(live) for program in list(self.programs))
            self.kick()

    def _commit(self, change: _Change) -> None:
        seed = change.seed
        if change.error is not None:
            if change.germination is not None:
                self.fail(seed, change.error)
                change.germination.settle(change.error)
            return
        if change.germination is not None:
            seed.live = True
            self._move(seed, change.target, "its kernels are live" if self.programs else "the model runs eagerly")
            change.germination.settle()
        else:
            seed.live = False
            seed.set_body(None, None, {})
            self._release(self.clock)

    def run_seed(self, site: int, x: Tensor, alpha: Tensor, gate: Tensor, source: Tensor | None = None) -> Tensor:
        """Run a seed eagerly, for a program that is not compiled."""
        seed = self.by_index[site]
        if not seed.live or seed.body is None:
            return x
        return ops.seed_forward(x, seed.body, alpha[site].clone(), gate[site].clone(), source)

    # Getting kernels ready.

    def _live(self) -> set[KasminaSeed]:
        return {seed for seed in self.by_index if seed.live}

    def _together_with(self, change: _Change) -> list[_Change]:
        return [member for member in self._pending if member.group is change.group]

    def _live_after(self, change: _Change) -> set[KasminaSeed]:
        live = self._live()
        last = self._together_with(change)[-1]
        for member in self._pending:
            if member.error is None:
                (live.add if member.germination is not None else live.discard)(member.seed)
            if member is last:
                break
        return live

    def _can_run(self, live: set[KasminaSeed]) -> bool:
        return all(program.can_run(live) for program in list(self.programs))

    def _enqueue(self, *group: _Change) -> None:
        """Queue changes of one group; if everything for them is there already, the next step boundary makes them live."""
        if not group:
            return
        waiting = list(self._pending)
        self._pending += group
        if not self.programs:
            for change in group:
                change.ready = True
            self.apply()
            return
        if all(c.ready for c in waiting) and self._can_run(self._live_after(group[0])):
            self._stage(group[0])
        self.kick()

    def _stage(self, change: _Change) -> None:
        for member in self._together_with(change):
            member.ready = True
            member.error = change.error
            if member.germination is not None:
                member.germination.mark_ready()
        self._boundary_work = True

    def kick(self) -> None:
        """Let the conductor look at what there is to do."""
        if self.programs:
            self._conductor.kick(next(iter(self.programs)).service)

    def work(self) -> list[Future[Any]]:
        """One round of the conductor: ask for kernels that are missing, stage changes that are ready.

        Returns:
            What to wait for before the next round; empty when nothing is left to do.
        """
        waiting: list[Future[Any]] = []
        with self.lock:
            first_of_groups = {change.group: change for change in reversed(self._pending)}
            heads = [change for change in self._pending if first_of_groups[change.group] is change]
            pending = [(change, self._live_after(change)) for change in heads]
            programs = list(self.programs)
            live = self._live()
        for change, after in pending:
            if not change.ready:
                waiting += self._prepare(change, after, programs)
        if not pending:
            for program in programs:
                waiting += self._improve(program, live)
        return waiting

    def _prepare(self, change: _Change, live: set[KasminaSeed], programs: list[SizedProgram]) -> list[Future[Any]]:
        """Get the kernels for one change; stage it when they are there, or when they cannot be had."""
        error: BaseException | None = None
        missing: list[Variant] = []
        try:
            for program in programs:
                missing += program.request(live, urgent=True, retry=not change.tried)
            change.tried = True
            error = next((variant.error for variant in missing if variant.error is not None), None)
        except Exception as problem:
            error = problem
        with self.lock:
            if change not in self._pending:
                return []
            if error is not None:
                change.error = GerminationError(f"{_bodies(self._together_with(change))} no kernel: {error}")
                change.error.__cause__ = error
            if error is not None or not missing:
                self._stage(change)
        return [variant.future for variant in missing if variant.future is not None and error is None]

    def _improve(self, program: SizedProgram, live: set[KasminaSeed]) -> list[Future[Any]]:
        """Get all plans for the morphology of now ready; the next boundary switches to a better one."""
        try:
            missing = program.request(live, urgent=False, retry=False)
        except Exception as error:
            logger.warning("a plan could not be prepared: %s", error)
            return []
        with self.lock:
            if live == self._live() and program.has_better(live):
                self._boundary_work = True
        return [variant.future for variant in missing if variant.future is not None and variant.error is None]

    def wait_for(self, germination: Germination, timeout: float | None) -> bool:
        """See :meth:`Germination.wait`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if not germination._ready.wait(timeout):
            return False
        self.apply_between_steps()
        rest = None if deadline is None else max(0.0, deadline - time.monotonic())
        return germination._done.wait(rest)

    @property
    def pending(self) -> bool:
        """Whether a change or a better plan is on its way."""
        return bool(self._pending) or self._boundary_work or self._conductor.busy

    def settle(self, timeout: float | None) -> bool:
        """Block until no background work is left and the best plan runs; call it between steps."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            rest = None if deadline is None else deadline - time.monotonic()
            if rest is not None and rest <= 0:
                return False
            idle = self._conductor.wait(0.2 if rest is None else min(0.2, rest))
            if self._boundary_work:
                self.apply_between_steps()
            elif idle and not self.pending:
                return True

    @property
    def morphology(self) -> Morphology:
        """Which seeds have a live body, and which."""
        with self.lock:
            return Morphology(
                frozenset(
                    (seed.name, seed.blueprint, blueprints.get(seed.blueprint).config_key(seed.config))
                    for seed in self.by_index
                    if seed.live and seed.blueprint is not None
                )
            )


def _bodies(changes: Sequence[_Change]) -> str:
    names = ", ".join(repr(change.seed.name) for change in changes)
    return f"the body at site {names} has" if len(changes) == 1 else f"the bodies at sites {names} have"


def _body_seed(model_seed: int, site: str, number: int) -> int:
    text = f"{model_seed}/{site}/{number}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


_validated: set[tuple[Any, ...]] = set()


def _validate_once(kind: blueprints.Blueprint, body: nn.Module, site: SiteSpec, config: Mapping[str, Any]) -> None:
    """Check a user's body unless one of the same blueprint and parameters was checked for a site of the same kind.

    The blueprints of this package are checked by its tests, so that germinating one costs the training thread less.
    """
    if (kind.function.__module__ or "").startswith("esper_fx.blueprints."):
        return
    what = (kind.function, kind.config_key(config), site.shape, site.dtype, site.device, site.feature_dim)
    if what not in _validated:
        blueprints.validate_body(kind.name, body, site)
        _validated.add(what)


def _load_weights(body: nn.Module, weights: Mapping[str, Tensor], blueprint: str, site: str) -> None:
    try:
        body.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        raise BlueprintError(f"weights for blueprint {blueprint!r} at site {site!r} do not fit: {error}") from error
