"""The demo's run: train, grow at two sites while training, keep one growth, prune the other, train on."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

import esper_fx
from esper_fx import Germination, KasminaSeed, MorphableModel, Stage
from esper_fx.demo.record import Event, Record, Step, median_seconds
from esper_fx.demo.task import DemoError, Labelled, Task, Trial, accuracy, loss, parameter_count

_PATIENCE_S = 240.0
_LAST_KERNELS_S = 90.0
# On a machine too slow for the planned steps, fewer are trained: the demo has to end by itself.
_TRIED_STEPS = 40
_LEAST_STEPS = 200
# The comparison trains the steps spent waiting for kernels as well, so it may take longer than the planned ones.
_LONGEST_COMPARISON = 1.7
# Alpha while a growth incubates: low, so that the picture shows how it is blended in.
_QUIET = 0.25


class Watcher(Protocol):
    """Is told what happens; drawing it is its own business."""

    def say(self, text: str) -> None:
        """Something worth a line."""

    def stepped(self, done: int, planned: int, doing: str) -> None:
        """A training step has ended; `planned` grows with every step spent waiting."""


class Run:
    """One run of a demo.

    Args:
        task: What to train.
        steps: Training steps planned; those trained while a growth is compiled or blended in come on top.
        limit_s: Seconds that the planned steps may take; None is no limit.
        seed: Of the order of the training data.
        watcher: Is told of the progress.
        compiled: Whether to run through torch.compile.
    """

    def __init__(
        self,
        task: Task,
        *,
        steps: int,
        seed: int,
        watcher: Watcher,
        limit_s: float | None = None,
        compiled: bool = True,
    ) -> None:
        self.task = task
        self.limit_s = limit_s
        self._steps = self.planned = steps
        self.seed = seed
        self.watcher = watcher
        self.record = Record()
        # Another optimizer trains a copy later, for comparison; morph shares parameters with the network it is given.
        self._untouched = copy.deepcopy(task.net)
        self._batches = torch.Generator().manual_seed(seed)
        example, _ = task.sample(torch.Generator().manual_seed(seed))
        self.model: MorphableModel = esper_fx.morph(task.net, sites=task.sites, example_inputs=(example,), seed=seed)
        self._forward = torch.compile(self.model, backend="esper") if compiled else self.model
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=task.learning_rate)
        esper_fx.attach(self._optimizer, self.model)
        self._seeds: list[KasminaSeed] = [self.model.seeds[trial.site] for trial in task.trials]
        self._unsettled: list[Event] = []
        self._doing = "first step: compiling"
        self._call_seconds = 0.0

    def start(self) -> None:
        """Train one step, which compiles the network; nothing is compiled on this thread after it."""
        self._step()
        self.watcher.say(f"first step, with compilation: {self.record.steps[0].seconds:.1f} s; training starts")

    def train(self) -> Record:
        """Run to the end, after `start`, and return what was measured.

        Raises:
            DemoError: A growth did not come to life.
        """
        for _ in self._life():
            self._step()
        return self.record

    def train_without(self) -> None:
        """Train the same network on the same batches as often without any growth, unless that would take too long."""
        net, batches = self._untouched, torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.AdamW(net.parameters(), lr=self.task.learning_rate)
        count = len(self.record.steps)
        started = time.perf_counter()
        for index in range(count):
            inputs, classes = self.task.sample(batches)
            optimizer.zero_grad()
            torch.autograd.backward(loss(net(inputs), classes))
            optimizer.step()
            self.watcher.stepped(index + 1, count, "the same network without growth, to compare")
            if index + 1 == _TRIED_STEPS and self.limit_s is not None:
                needed = (time.perf_counter() - started) / _TRIED_STEPS * count
                if needed > _LONGEST_COMPARISON * self.limit_s:
                    self.watcher.say(f"the comparison without growth is left out: it would take {needed:.0f} s here")
                    return
        self.record.accuracies["without growth"] = accuracy(net, self.task.test)

    def _life(self) -> Iterator[None]:
        """The story; every `yield` is one training step."""
        yield from self._train("as it is", _TRIED_STEPS)
        self._shorten()
        yield from self._train("as it is", self._share(50) - len(self.record.steps))
        self._measure("before")
        self.model.reset_stats()
        for trial, seed in zip(self.task.trials, self._seeds, strict=True):
            yield from self._grow(trial, seed)
        self._measure("with both")
        kept, pruned = self._compare()
        self._ask(f"fossilize {kept.blueprint}", kept, kept.fossilize)
        self._ask(f"prune {pruned.blueprint}", pruned, pruned.prune, kernels=True)
        yield from self._train("after growth", self._share(30))
        deadline = time.monotonic() + _LAST_KERNELS_S
        yield from self._until(
            lambda: not self._unsettled or time.monotonic() > deadline,
            "after growth, the last kernels are on their way",
        )
        self.record.marks["after"] = len(self.record.steps)
        yield from self._train("after growth", self._share(10))
        self._measure("after")

    def _grow(self, trial: Trial, seed: KasminaSeed) -> Iterator[None]:
        """Germinate, incubate, blend in."""
        name = f"{trial.blueprint} at {trial.site}"
        germinations: list[Germination] = []
        event = self._ask(
            f"germinate {trial.blueprint}",
            seed,
            lambda: germinations.append(seed.germinate(trial.blueprint, alpha=_QUIET, **trial.config)),
            kernels=True,
        )
        asked = time.perf_counter()
        yield from self._until(germinations[0].done, f"{name} is being compiled, training goes on")
        problem = germinations[0].exception()
        if problem is not None:
            raise DemoError(f"{name} did not come to life: {problem}") from problem
        # The step that has just ended was the first with the body, unless none was needed.
        event.live, event.live_seconds = max(event.step, len(self.record.steps) - 1), time.perf_counter() - asked
        self.watcher.say(
            f"step {event.live:,}: {name} is live, {event.live_seconds:.1f} s and "
            f"{event.live - event.step:,} steps later"
        )
        yield from self._train(f"{name} incubates", self._share(5))
        ticks = self._share(10)
        self._ask(f"blend in {trial.blueprint}", seed, lambda: seed.blend(to=1.0, steps=ticks, schedule="cosine"))
        yield from self._until(lambda: seed.stage == Stage.ACTIVE, f"{name} is blended in")

    def _compare(self) -> tuple[KasminaSeed, KasminaSeed]:
        """Switch each growth off for one evaluation; the one that is missed more is kept."""
        full = accuracy(self.model, self.task.validation)
        missed = []
        for seed in self._seeds:
            alpha = seed.alpha
            self.model.state.write(seed.index, alpha=0.0)
            missed.append(full - accuracy(self.model, self.task.validation))
            self.model.state.write(seed.index, alpha=alpha)
            self.record.without[seed.name] = full - missed[-1]
        first, second = self._seeds
        kept, pruned = (first, second) if missed[0] >= missed[1] else (second, first)
        self.watcher.say(
            f"step {len(self.record.steps):,}: validation accuracy {full:.1%}, "
            + ", ".join(f"without {seed.blueprint} {self.record.without[seed.name]:.1%}" for seed in self._seeds)
        )
        self.watcher.say(f"step {len(self.record.steps):,}: keep {kept.blueprint}, prune {pruned.blueprint}")
        return kept, pruned

    def _shorten(self) -> None:
        if self.limit_s is None:
            return
        fitting = int(self.limit_s / median_seconds(self.record.steps[1:]))
        if fitting < self._steps:
            self._steps = self.planned = max(fitting, _LEAST_STEPS)
            self.watcher.say(f"this machine is slow or busy: {self._steps:,} steps are planned instead of more")

    def _share(self, percent: int) -> int:
        return self._steps * percent // 100

    def _train(self, doing: str, steps: int) -> Iterator[None]:
        self._doing = doing
        for _ in range(steps):
            yield

    def _until(self, done: Callable[[], bool], doing: str) -> Iterator[None]:
        """Train until something has happened; these steps come on top of the planned ones."""
        self._doing = doing
        deadline = time.monotonic() + _PATIENCE_S
        while not done():
            if time.monotonic() > deadline:
                raise DemoError(f"waited {_PATIENCE_S:.0f} s in vain ({doing}); esper-fx doctor checks this machine")
            self.planned += 1
            yield

    def _ask(self, what: str, seed: KasminaSeed, act: Callable[[], None], *, kernels: bool = False) -> Event:
        """Ask for a change between two steps; the time that takes counts as part of the next step.

        Changes without new `kernels` are device writes: settled at once.
        """
        started = time.perf_counter()
        act()
        seconds = time.perf_counter() - started
        self._call_seconds += seconds
        event = Event(what, seed.name, len(self.record.steps), seconds)
        self.record.events.append(event)
        if kernels:
            self._settle()  # kernels that are still on their way for an earlier event are this one's from now on
            self._unsettled.append(event)
        else:
            event.settled = event.step
        return event

    def _measure(self, name: str) -> None:
        self.record.accuracies[name] = accuracy(self.model, self.task.test)
        self.record.parameters[name] = parameter_count(self.model)
        self.watcher.say(
            f"step {len(self.record.steps):,}: test accuracy {self.record.accuracies[name]:.1%}, "
            f"{self.record.parameters[name]:,} parameters"
        )

    def _step(self) -> None:
        started = time.perf_counter()
        inputs, classes = self._draw()
        self._optimizer.zero_grad()
        value = loss(self._forward(inputs), classes)
        torch.autograd.backward(value)
        self._optimizer.step()
        number = value.item()
        seconds = time.perf_counter() - started + self._call_seconds
        self._call_seconds = 0.0
        self.record.steps.append(Step(number, seconds, tuple(seed.alpha if seed.live else 0.0 for seed in self._seeds)))
        if self._unsettled and not self.model.pending:
            self._settle()
        self.watcher.stepped(len(self.record.steps), self.planned, self._doing)

    def _settle(self) -> None:
        for event in self._unsettled:
            event.settled = len(self.record.steps)
        self._unsettled.clear()

    def _draw(self) -> Labelled:
        return self.task.sample(self._batches)
