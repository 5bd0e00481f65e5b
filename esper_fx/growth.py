"""Growth: what happens to the seeds of one model, when, and what the engine must get ready for it."""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
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


@dataclass(eq=False)
class _Change:
    """A change of the morphology that is on its way: a seed's body comes (with its germination) or goes."""

    seed: KasminaSeed
    germination: Germination | None
    target: Stage
    error: BaseException | None = None
    ready: bool = False
    tried: bool = False


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
        started = time.perf_counter()
        with self.lock:
            check_transition(seed.name, seed.stage, Stage.GERMINATING)
            kind = blueprints.get(blueprint)
            site = seed.site
            reason = kind.fits(site)
            if reason is not None:
                fitting = ", ".join(seed.fits()) or "none"
                raise BlueprintError(
                    f"blueprint {blueprint!r} does not fit site {seed.name!r}: {reason}. It fits: {fitting}"
                )
            number = int(self.state.read("germinations", seed.index))
            body = kind.build(site, config, seed=_body_seed(self.model_seed, seed.name, number))
            _validate_once(kind, body, site, config)
            if weights is not None:
                _load_weights(body, weights, blueprint, seed.name)
            body.train(seed.training)
            if alpha is None:
                alpha = 1.0 if weights is not None else settings().incubation_alpha
            target = Stage.INCUBATING if weights is None else Stage.ACTIVE
            self.state.write(seed.index, alpha=alpha, gate=float(target is Stage.ACTIVE), germinations=number + 1)
            seed.set_body(body, blueprint, kind.bind(config))
            seed.error = None
            self._move(seed, Stage.GERMINATING, f"germinated as {blueprint}")
            if self.attachment is not None:
                self.attachment.join(seed)
            germination = Germination(seed)
            self._enqueue(_Change(seed, germination, target))
        self._host += time.perf_counter() - started
        return germination

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
        started = time.perf_counter()
        with self.lock:
            check_transition(seed.name, seed.stage, Stage.EMBARGOED)
            self._embargo(seed, why)
        self._host += time.perf_counter() - started

    def fail(self, seed: KasminaSeed, error: BaseException) -> None:
        """Quarantine a seed: ERROR, then EMBARGOED; alpha is 0 at once and the body goes."""
        with self.lock:
            seed.error = error
            count = int(self.state.read("error_count", seed.index))
            self.state.write(seed.index, alpha=0.0, gate=0.0, error_count=count + 1)
            self._move(seed, Stage.ERROR, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            self._embargo(seed, "quarantined after an error")

    def _embargo(self, seed: KasminaSeed, why: str) -> None:
        coming = next((c for c in self._pending if c.seed is seed), None)
        until = self.clock + settings().embargo_steps
        self.state.write(seed.index, alpha=0.0, gate=0.0, embargo_until=until)
        self._move(seed, Stage.EMBARGOED, why)
        if self.attachment is not None:
            self.attachment.leave(seed)
        if coming is not None:
            self._pending.remove(coming)
            if coming.germination is not None:
                error = seed.error or GerminationError(f"site {seed.name!r} was pruned before its body was live")
                coming.germination.settle(error)
        if seed.live:
            self._enqueue(_Change(seed, None, Stage.EMBARGOED))
        else:
            seed.set_body(None, None, {})
            self._release(self.clock)

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
                if change.error is None and not self._can_run(self._live_after(change)):
                    change.ready = False  # a program has come meanwhile
                    break
                self._pending.pop(0)
                self._commit(change)
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

    def run_seed(self, site: int, x: Tensor, alpha: Tensor, gate: Tensor) -> Tensor:
        """Run a seed eagerly, for a program that is not compiled."""
        seed = self.by_index[site]
        if not seed.live or seed.body is None:
            return x
        return ops.seed_forward(x, seed.body, alpha[site].clone(), gate[site].clone())

    # Getting kernels ready.

    def _live(self) -> set[KasminaSeed]:
        return {seed for seed in self.by_index if seed.live}

    def _live_after(self, last: _Change) -> set[KasminaSeed]:
        live = self._live()
        for change in self._pending:
            if change.error is None:
                (live.add if change.germination is not None else live.discard)(change.seed)
            if change is last:
                break
        return live

    def _can_run(self, live: set[KasminaSeed]) -> bool:
        return all(program.can_run(live) for program in list(self.programs))

    def _enqueue(self, change: _Change) -> None:
        """Queue a change; if everything for it is there already, the next step boundary makes it live."""
        self._pending.append(change)
        if not self.programs:
            change.ready = True
            self.apply()
            return
        if all(c.ready for c in self._pending[:-1]) and self._can_run(self._live_after(change)):
            self._stage(change)
        self.kick()

    def _stage(self, change: _Change) -> None:
        change.ready = True
        if change.germination is not None:
            change.germination.mark_ready()
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
            pending = [(change, self._live_after(change)) for change in self._pending]
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
                change.error = GerminationError(f"the body at site {change.seed.name!r} has no kernel: {error}")
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
