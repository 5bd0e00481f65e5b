"""Growth: the life of one model's seeds, which transitions they make, when and why."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from esper_fx import _torch, blueprints, ops
from esper_fx._garbage import collecting_later
from esper_fx.cache._background import ForkSafeLock
from esper_fx.change_queue import Move
from esper_fx.changes import Changes
from esper_fx.checks import shortened, shown
from esper_fx.engine.probes import Sampler, measure_eagerly
from esper_fx.errors import BlueprintError, GerminationError
from esper_fx.germination import Germination
from esper_fx.lifecycle import GrowthEvent, Ledger, Stage, check_transition
from esper_fx.replicas import warn_of_other_processes
from esper_fx.seed import KasminaSeed
from esper_fx.settings import settings
from esper_fx.site import SiteSpec
from esper_fx.state import KasminaStateLayout
from esper_fx.state_fields import check_value

if TYPE_CHECKING:
    from esper_fx.optim import Attachment
    from esper_fx.replicas import Replicas

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


class Growth:
    """The life of one model's seeds: every transition goes through here.

    A transition that changes the morphology is handed to ``changes``, which gets its kernels ready and comes back at a
    step boundary to have it committed.

    Attributes:
        handle: Number of the model within the process.
        state: The state arrays.
        seeds: The seeds by site.
        by_index: The same by their row in the state arrays.
        ledger: What has happened.
        clock: Training steps seen: steps of the attached optimizer, or forward calls where there is none.
        changes: What is on its way, and the step boundaries.
        attachment: The tie to an optimizer, or None.
        scheduled: Whether an alpha is on its way.
        sampler: What takes measurements at the sites, or None.
        replicas: The processes that train replicas of the model, where what grows is kept alike in them, or None.
        lock: Held while a transition is made.
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
        self.lock = ForkSafeLock()
        self.attachment: Attachment | None = None
        self.scheduled = True  # until a tick has looked
        self.sampler: Sampler | None = None
        self.replicas: Replicas | None = None
        self.changes = Changes(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("state", "model_seed", "seeds", "by_index", "ledger", "clock")}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__dict__.update(saved)
        self._begin()
        self.changes.unfinished = True

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
        if self.replicas is not None:
            self.replicas.check_attached()
        warn_of_other_processes(self)
        with self.lock, collecting_later():
            bodies = [self._build_body(order) for order in orders]
            if self.replicas is not None:
                self.replicas.averaging.share(bodies)
            germinations, coming = [], []
            for order, body in zip(orders, bodies, strict=True):
                target = Stage.INCUBATING if order.weights is None else Stage.ACTIVE
                self._plant(order, body, target)
                germinations.append(Germination(order.seed))
                coming.append(Move(order.seed, germinations[-1], target))
            self.changes.add(*coming)
        self.changes.count_host_time(time.perf_counter() - started)
        return germinations

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
        if order.alpha is not None:
            check_value(seed.name, "alpha", order.alpha)
        number = int(self.state.read("germinations", seed.index))
        body = kind.build(site, config, seed=body_seed(self.model_seed, seed.name, number))
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
        gate = float(target is Stage.ACTIVE)
        self.state.write(seed.index, alpha=alpha, gate=gate, germinations=number + 1, health=math.nan, change=math.nan)
        seed.set_body(body, order.blueprint, blueprints.get(order.blueprint).bind(order.config))
        seed.error = None
        self._move(seed, Stage.GERMINATING, f"germinated as {order.blueprint}")
        if self.attachment is not None:
            self.attachment.join(seed)

    def blend(self, seed: KasminaSeed, *, to: float, steps: int, schedule: str) -> None:
        """See :meth:`KasminaSeed.blend`."""
        with self.lock:
            check_transition(seed.name, seed.stage, Stage.BLENDING)
            to = check_value(seed.name, "alpha_target", to, "to")
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
        if self.replicas is not None:
            self.replicas.check_attached()
        steps = settings().embargo_steps if embargo_steps is None else embargo_steps
        with self.lock, collecting_later():
            for seed in seeds:
                check_transition(seed.name, seed.stage, Stage.EMBARGOED)
            live = [seed for seed in seeds if self._embargo(seed, why, steps)]
            self.changes.add(*[Move(seed, None, Stage.EMBARGOED) for seed in live])
        self.changes.count_host_time(time.perf_counter() - started)

    def fail(self, seed: KasminaSeed, error: BaseException) -> None:
        """Quarantine a seed: ERROR, then EMBARGOED; alpha is 0 at once and the body goes."""
        with self.lock:
            seed.error = error
            count = int(self.state.read("error_count", seed.index))
            self.state.write(seed.index, alpha=0.0, gate=0.0, error_count=count + 1)
            self._move(seed, Stage.ERROR, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            if self._embargo(seed, "quarantined after an error", settings().embargo_steps):
                self.changes.add(Move(seed, None, Stage.EMBARGOED))

    def _embargo(self, seed: KasminaSeed, why: str, steps: int) -> bool:
        """Silence a seed and close its site; returns whether it has a live body, which must then go at a step boundary."""
        until = self.clock + steps
        self.state.write(seed.index, alpha=0.0, gate=0.0, embargo_until=until, health=math.nan, change=math.nan)
        self._move(seed, Stage.EMBARGOED, why)
        if self.attachment is not None:
            self.attachment.leave(seed)
        if seed.body is not None:
            seed.body.zero_grad()  # nobody else does from now on, and a norm over the model's gradients would go on counting it
        coming = self.changes.withdraw(seed)
        if coming is not None and coming.germination is not None:
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

    # What the changes and the operator call back.

    def commit(self, move: Move, error: BaseException | None) -> None:
        """A move has come through the queue: make it so, or quarantine its seed if its kernels cannot be had.

        Args:
            move: It.
            error: Why they cannot.
        """
        seed = move.seed
        if move.germination is None:
            seed.live = False
            seed.set_body(None, None, {})
            self._release(self.clock)
        elif error is not None:
            self.fail(seed, error)
            move.germination.settle(error)
        else:
            seed.live = True
            self.state.write(seed.index, health=math.nan, change=math.nan)  # measured while it was the identity
            why = "its kernels are live" if self.changes.programs else "the model runs eagerly"
            self._move(seed, move.target, why)
            move.germination.settle()

    def run_seed(self, site: int, x: Tensor, alpha: Tensor, gate: Tensor, source: Tensor | None = None) -> Tensor:
        """Run a seed eagerly, for a program that is not compiled."""
        seed = self.by_index[site]
        if not seed.live or seed.body is None:
            return self.measured(site, x, x)
        return self.measured(site, x, ops.seed_forward(x, seed.body, alpha[site].clone(), gate[site].clone(), source))

    def measured(self, site: int, x: Tensor, y: Tensor) -> Tensor:
        """What an eager seed returns for ``y``: that, measured where this step is to be."""
        sampler = self.sampler
        if sampler is None or not sampler.sampling or y.is_meta or _torch.may_be_repeated() or _torch.in_transform():
            return y
        return measure_eagerly(sampler, site, x, y, self.by_index[site].sketched_dim(tuple(x.shape)))

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


def body_seed(model_seed: int, site: str, number: int) -> int:
    """Seed of the initial values of the body that a site germinated as its ``number``-th, counted from 0."""
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
        named = dict(weights)
    except (TypeError, ValueError):
        named = {}
    if (not isinstance(weights, Mapping) and not named) or not all(isinstance(name, str) for name in named):
        raise BlueprintError(
            f"weights={shown(weights)} for blueprint {blueprint!r} at site {site!r}: expected a state_dict of its body, a dict "
            f"of tensors by name: {shortened(', '.join(body.state_dict()))}"
        )
    try:
        body.load_state_dict(named, strict=True)
    except RuntimeError as error:
        raise BlueprintError(
            f"weights for blueprint {blueprint!r} at site {site!r} do not fit: {shortened(str(error))}"
        ) from error
