"""Watch a model: measure at its sites in some of its steps, and tell those who want to know."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper_fx.checks import real, shown, whole
from esper_fx.errors import TelemetryError
from esper_fx.lifecycle import Stage
from esper_fx.ops.probe import GRADIENTS
from esper_fx.ops.sensor import MAX_DIRECTIONS
from esper_fx.seeds import Seeds
from esper_fx.state_fields import MEASURED
from esper_fx.telemetry.records import SiteRecord, records_of
from esper_fx.telemetry.smoothing import measurements, merge_gradients, merge_values, smoothed

if TYPE_CHECKING:
    from esper_fx.engine.probes import Taken
    from esper_fx.growth import Growth
    from esper_fx.model import MorphableModel
    from esper_fx.seed import KasminaSeed

logger = logging.getLogger(__name__)

Subscriber = Callable[[list[SiteRecord]], object]


def watch(model: MorphableModel, *, every: int = 50, decay: float = 0.9, directions: int = 0) -> Watch:
    """Measure at the sites of a model from now on, in every so many training steps.

    A compiled model gets kernels with probes for that, made beside training as all others are; steps are measured once they
    are ready, and the other steps run without probes. What is measured is in ``seed.health`` and in what
    :func:`esper_fx.telemetry.records` returns, from the step after the measured one.

    Not measured: steps of a model compiled with another backend than "esper", forward passes that may be repeated in the
    backward pass (checkpointing), and programs that hold several morphed models.

    Args:
        model: A morphed model, or what `torch.compile` has made of one.
        every: Training steps from one that is measured to the next, 1 or more.
        decay: How much of what was known before stays when a step has been measured, from 0 (nothing) to below 1.
        directions: How many random directions a sketch has of the gradient that a linear map at a site would get, 0 to 64.
            With sketches there is ``potential`` in the records, and :meth:`Watch.sketch`.

    Returns:
        What ends it, and what takes subscribers.

    Raises:
        TelemetryError: This is no morphed model, a number is out of range, or the model is watched already.
    """
    from esper_fx.model import morphed

    target = morphed(model, "watch", TelemetryError)
    steps, weight, number = whole(every), real(decay), whole(directions)
    if steps is None or steps < 1:
        raise TelemetryError(f"watch(every={shown(every)}): expected a whole number of steps, 1 or more")
    if weight is None or not 0 <= weight < 1:
        raise TelemetryError(f"watch(decay={shown(decay)}): expected a number from 0 to below 1")
    if number is None or not 0 <= number <= MAX_DIRECTIONS:
        raise TelemetryError(
            f"watch(directions={shown(directions)}): expected a whole number from 0 to {MAX_DIRECTIONS}"
        )
    if target.growth.sampler is not None:
        raise TelemetryError("this model is watched already; call close() on what watch() returned first")
    return Watch(target.growth, steps, weight, number)


class Watch:
    """Takes what is measured at a model's sites; a context manager that ends with its block.

    Attributes:
        every: Training steps from one that is measured to the next.
        decay: Weight of what was known before.
        directions: How many random directions a sketch has; 0: none is made.
        sampling: Whether the step that is under way is measured.
    """

    def __init__(self, growth: Growth, every: int, decay: float, directions: int) -> None:
        self.every = every
        self.decay = decay
        self.directions = directions
        self.sampling = False
        self._growth = weakref.ref(growth)
        self._subscribers: list[Subscriber] = []
        self._taken: list[Taken] = []
        self._bodies: dict[int, weakref.ref[nn.Module] | None] = {}  # of the seeds in what was taken
        self._clock = -1  # of what was taken
        self._step: tuple[int, bool] | None = None  # clock when the step under way began, and whether with gradients
        self._unsaid = False
        self._sketches: dict[int, Tensor] = {}
        self._tensors: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        growth.sampler = self
        growth.changes.kick()

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call ``subscriber`` with all records after every step that was measured; returns what ends that.

        It is called on the thread that trains, between two steps: it should hand long work to another thread. An error that
        it raises is logged, and it is called no more.

        Raises:
            TelemetryError: It cannot be called.
        """
        if not callable(subscriber):
            raise TelemetryError(f"subscribe({shown(subscriber)}): expected a function that takes a list of records")
        self._subscribers.append(subscriber)

        def unsubscribe() -> None:
            if subscriber in self._subscribers:
                self._subscribers.remove(subscriber)

        return unsubscribe

    def sketch(self, site: str) -> Tensor | None:
        """A sketch of xᵀg, the gradient that a linear map from the value x at a site to a change of it would get.

        It is Omegaᵀ xᵀ g for a random Omega, ``[features, directions]``, whose square is the identity on average; see
        :mod:`esper_fx.ops.sensor`. So the sum of its squares estimates that of xᵀg (``potential`` in the records), and its
        right singular vectors are the outputs of the map that would lower the loss fastest.

        Args:
            site: Name of a site.

        Returns:
            Float32 ``[directions, features]``, smoothed as all that is measured; None while there is none.

        Raises:
            UnknownSiteError: The model has no such site.
        """
        growth = self._growth()
        sketch = None if growth is None else self._sketches.get(Seeds(growth.seeds)[site].index)
        return sketch if sketch is not None and bool(torch.isfinite(sketch).all()) else None

    def flush(self) -> None:
        """Take in the last measured step now; call it between steps, after the last one for example."""
        if self._taken:
            self._take_in()

    def close(self) -> None:
        """Measure no more, after taking in the last measured step; what was measured stays."""
        growth = self._growth()
        if growth is not None and growth.sampler is self:
            self.flush()
            self.sampling = False
            growth.sampler = None
            for program in list(growth.changes.programs):
                program.measuring.drop()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # For the engine.

    def begin_step(self, clock: int) -> None:
        """A step begins: what the last measured one has brought is taken in once its backward pass is over."""
        growth = self._growth()
        self._step = clock, torch.is_grad_enabled()
        due = clock % self.every == 0 and clock != self._clock
        if growth is not None and growth.attachment is not None:
            due = due and torch.is_grad_enabled()  # an evaluation takes the place of no training step
        if self._taken and (due or clock > self._clock + 1 or all(taken.complete for taken in self._taken)):
            self._take_in()
        self.sampling = due
        if self._unsaid:
            self._tell()

    def join_step(self, clock: int) -> None:
        """A program that has not run in the step under way: that is another one if the optimizer has made a step meanwhile,
        or if it was an evaluation and this is not."""
        if self._step is None or self._step[0] != clock or (torch.is_grad_enabled() and not self._step[1]):
            self.begin_step(clock)

    def take(self, taken: Taken) -> None:
        """Keep what a region has measured until its backward pass is over."""
        growth = self._growth()
        if growth is not None:
            self._clock = growth.clock
            self._taken.append(taken)
            for index in taken.seeds:
                self._bodies.setdefault(index, _working_body(growth.by_index[index]))

    def forget(self) -> None:
        """The model is another one now: what was taken and not taken in yet says nothing of it, nor do the sketches."""
        self._taken, self._bodies, self._clock = [], {}, -1
        self._sketches.clear()

    def _take_in(self) -> None:
        taken, self._taken = self._taken, []
        bodies, self._bodies = self._bodies, {}
        growth = self._growth()
        if growth is None:
            return
        with torch.no_grad():
            changed = [i for i, body in bodies.items() if body is not _working_body(growth.by_index[i])]
            self._write(growth, taken, changed)
        self._unsaid = True
        self._tell()

    def _tell(self) -> None:
        """Tell subscribers, once the host has what was measured."""
        growth = self._growth()
        if growth is None or not growth.state.arrived:
            return
        self._unsaid = False
        for subscriber in list(self._subscribers):
            try:
                subscriber(records_of(growth))
            except Exception:
                logger.exception("a subscriber to telemetry failed; it is called no more")
                if subscriber in self._subscribers:  # it may have ended that itself
                    self._subscribers.remove(subscriber)

    def _write(self, growth: Growth, taken: list[Taken], changed: list[int]) -> None:
        """Put it into the state arrays; of the seeds ``changed``, which have other bodies by now, nothing that is of a body."""
        state, n = growth.state, growth.state.n_seeds
        device = state.step.device
        seeds = torch.cat([self._numbers(part.seeds, device) for part in taken])
        values = merge_values(seeds, torch.cat([part.values.to(device) for part in taken]), n)
        gradients, has_gradient = values.new_zeros(n, len(GRADIENTS)), torch.zeros(n, dtype=torch.bool, device=device)
        tables, places = [], []
        for part in taken:
            if part.leaf is not None and part.leaf.grad is not None and part.rows:
                rows = self._numbers(part.rows, part.leaf.device)
                tables.append(part.leaf.grad.index_select(0, rows).to(device))
                places.append(self._numbers(tuple(part.seeds[row] for row in part.rows), device))
        if tables:
            gradients = merge_gradients(torch.cat(places), torch.cat(tables), n)
            has_gradient.index_fill_(0, torch.cat(places), True)
        potential = self._sum_up_sketches(taken, n)
        table = measurements(values, gradients, has_gradient, potential.to(device))
        for field in ("health", "change") if changed else ():
            table[MEASURED.index(field)].index_fill_(0, torch.tensor(changed, device=device), torch.nan)
        sampled = values.new_zeros(n, dtype=torch.bool).index_fill_(0, seeds, True)
        fields: dict[str, Any] = dict(smoothed(dict(state.named_buffers()), table, self.decay))
        fields["samples"] = state.samples + sampled
        fields["sampled_at"] = torch.where(sampled, self._clock, state.sampled_at)
        state.record(fields)

    def _sum_up_sketches(self, taken: list[Taken], n: int) -> Tensor:
        """Smooth the sketches; returns the sum of squares of each, float64 ``[n]``, NaN where there is none."""
        fresh: dict[int, Tensor] = {}
        for part in taken:
            for row, leaf in zip(part.sensors, part.sketches, strict=True):
                if leaf.grad is not None:
                    seed = part.seeds[row]
                    fresh[seed] = leaf.grad if seed not in fresh else fresh[seed] + leaf.grad
        for seed, sketch in fresh.items():
            before = self._sketches.get(seed)
            if before is None or before.shape != sketch.shape:
                before = sketch
            known, finite = torch.isfinite(before).all(), torch.isfinite(sketch).all()  # the first may have overflowed
            smooth = torch.where(known, torch.lerp(sketch, before, self.decay), sketch)
            self._sketches[seed] = torch.where(finite, smooth, before)
        potential = torch.full((n,), torch.nan, dtype=torch.float64)
        if fresh:
            norms = torch.stack([torch.linalg.vector_norm(self._sketches[seed]) for seed in fresh])
            potential = potential.to(norms.device).index_copy_(
                0, self._numbers(tuple(fresh), norms.device), norms.double().square()
            )
        return potential

    def _numbers(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        """Numbers as a tensor, made once: making it waits for a GPU."""
        if (numbers, device) not in self._tensors:
            self._tensors[numbers, device] = torch.tensor(numbers, device=device)
        return self._tensors[numbers, device]


def _working_body(seed: KasminaSeed) -> weakref.ref[nn.Module] | None:
    """The body that takes part in the computation and is not silenced; its reference is the same while it lives."""
    body = seed.body if seed.live and seed.stage is not Stage.EMBARGOED else None
    return None if body is None else weakref.ref(body)
