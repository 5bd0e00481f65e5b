"""One structural change in the life of a fresh process, watched step by step: the child side of `benchmarks swap`."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

from benchmarks import training
from benchmarks.harness import GcPauses, Stamps, median
from esper_fx.lifecycle import Stage

WARMUP = 10
TAKEOVER_S = 400.0


def prepare(model: str, seed: int) -> dict[str, Any]:
    """Compile the model without a change, so that its kernels are in the store."""
    training.settle(training.esper_loop(training.case(model, seed)))
    return {}


def grow_running(model: str, steps: int, after: int, seed: int) -> dict[str, Any]:
    """Germinate in a training loop that never stops, and watch until ``after`` steps past the last takeover.

    Args:
        model: Name of the model.
        steps: Steps measured before the event, and at least as many after it.
        after: Steps to watch once both plans run the new morphology.
        seed: Of the model.

    Returns:
        ``before_s`` and ``event_s`` (lengths of steps; the first of the event contains ``germinate()``), ``live_s`` and
        ``takeover_s`` (from the call until the seed computes / until both plans run), and what the engine says of
        itself.
    """
    loop = training.esper_loop(training.case(model, seed))
    training.settle(loop)
    training.wait_for_a_worker()
    watch = _Watch(loop)
    before = watch.run(WARMUP + steps)[WARMUP:]
    loop.net.reset_stats()
    compiled_before = loop.net.stats().kernels_compiled
    target = loop.net.seeds[training.MIDDLE[model]]
    watch.begin()
    started = perf_counter()
    germination = target.germinate("low_rank", rank=8)
    call_s = perf_counter() - started
    live_s = takeover_s = float("nan")
    left = after
    while left > 0:
        watch.step()
        elapsed = perf_counter() - started
        if target.stage is Stage.ERROR or (germination.done() and germination.exception() is not None):
            raise RuntimeError(f"the germination failed: {germination.exception() or target.error}")
        if math.isnan(live_s) and target.stage not in (Stage.DORMANT, Stage.GERMINATING):
            live_s = elapsed
        if not math.isnan(live_s) and training.on_best_plan(loop):
            takeover_s = elapsed if math.isnan(takeover_s) else takeover_s
            left -= 1
        if elapsed > TAKEOVER_S:
            raise RuntimeError(f"after {elapsed:.0f} s the change has not taken over: {loop.net.stats()}")
    event = watch.end()
    stats = loop.net.stats()
    return {
        "before_s": before,
        "event_s": event,
        "call_ms": call_s * 1e3,
        "live_s": live_s,
        "takeover_s": takeover_s,
        "host_ms": stats.longest_step_host_ms,
        "compiled": stats.kernels_compiled - compiled_before,
        "gc_pause_ms": watch.gc.longest_ms,
        "longest": _longest(event, watch.notes),
        "stats": training.stats_dict(loop),
    }


def grow_idle(model: str, seed: int) -> dict[str, Any]:
    """The same germination while the training loop stands still: ``idle_s`` until the kernels are ready."""
    loop = training.esper_loop(training.case(model, seed))
    training.settle(loop)
    training.wait_for_a_worker()
    started = perf_counter()
    loop.net.seeds[training.MIDDLE[model]].germinate("low_rank", rank=8).wait(training.SETTLE_S)
    idle_s = perf_counter() - started
    loop.net.settle(training.SETTLE_S)
    return {"idle_s": idle_s, "idle_takeover_s": perf_counter() - started}


def grow_plain(model: str, steps: int, after: int, seed: int) -> dict[str, Any]:
    """The ordinary way: replace a submodule under plain ``torch.compile``, which recompiles at the next step."""
    case = training.case(model, seed)
    body = training.build_body(case, training.MIDDLE[model], "low_rank", rank=8)
    loop = training.plain_loop(case)
    watch = _Watch(loop)
    before = watch.run(WARMUP + steps)[WARMUP:]
    watch.begin()
    training.grow_by_hand(loop.net, training.MIDDLE[model], body)
    loop.optimizer.add_param_group({"params": list(body.parameters())})
    for _ in range(after):
        watch.step()
    event = watch.end()
    return {"before_s": before, "event_s": event, "gc_pause_ms": watch.gc.longest_ms}


class _Watch:
    """Steps a loop without a gap between measurements, and notes what the engine was doing at each step."""

    def __init__(self, loop: training.Loop) -> None:
        self.loop = loop
        self.stamps = Stamps()
        self.notes: list[str] = []
        self.gc = GcPauses()
        self.describe: Callable[[], str] = self._engine if hasattr(loop.net, "stats") else str

    def begin(self) -> None:
        self.stamps, self.notes, self.gc = Stamps(), [], GcPauses()
        self.gc.__enter__()
        self.stamps.mark()

    def step(self) -> None:
        self.loop.step()
        self.notes.append(self.describe())
        self.stamps.mark()

    def end(self) -> list[float]:
        self.gc.__exit__()
        return self.stamps.seconds

    def run(self, steps: int) -> list[float]:
        self.begin()
        for _ in range(steps):
            self.step()
        return self.end()

    def _engine(self) -> str:
        stats = self.loop.net.stats()
        plans, pending = "+".join(stats.plans), "pending" if self.loop.net.pending else "settled"
        return (
            f"{plans}, {pending}, {stats.swaps} swaps, {stats.kernels_compiled} compiled, {stats.kernels_loaded} loaded"
        )


def _longest(event: list[float], notes: list[str], count: int = 8) -> list[dict[str, Any]]:
    """The longest steps of an event, with what the engine said at the end of the step before and of the step itself."""
    middle = median(event)
    ranked = sorted(range(len(event)), key=event.__getitem__, reverse=True)[:count]
    return [
        {
            "step": i,
            "ms": event[i] * 1e3,
            "of_median": event[i] / middle,
            "before": notes[i - 1] if i else "germinate()",
            "after": notes[i],
        }
        for i in ranked
    ]
