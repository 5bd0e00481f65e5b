"""A blueprint once more at an identical block: no compile, live on the next step, little time on the host."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import esper_fx
from benchmarks import training
from benchmarks.harness import quantiles
from benchmarks.options import Options
from benchmarks.report import Bar, Report, Row
from esper_fx import EngineStats

HOST_MS = Bar(at_most=5.0, aim=0.5)
STEPS = Bar(at_most=1, aim=1)
COMPILES = Bar(at_most=0, aim=0)
# Two blocks of one kind: of the CNN's, those whose channels and stride are equal.
TWINS = {"transformer": ("blocks.1", "blocks.4"), "cnn": ("blocks.4", "blocks.5")}
MOST_STEPS = 2000


def run(options: Options) -> Report:
    """Grow at one block, let everything settle, grow the same at another block and watch the very next steps.

    The other block is pruned and grown again several times; the host's time is the median.
    """
    report = Report("reuse")
    for name in options.models:
        with training.empty_store(), esper_fx.configure(embargo_steps=1):
            loop = training.esper_loop(training.case(name, options.seed))
            training.settle(loop)
            grow(loop, TWINS[name][0])
            training.settle(loop)
            events = [grow(loop, TWINS[name][1])]
            training.settle(loop)
            later = _compiles(loop.net.stats()) - events[0]["compiled_at_start"]
            for _ in range(2 if options.quick else 10):
                loop.net.seeds[TWINS[name][1]].prune()
                training.settle(loop)
                events.append(grow(loop, TWINS[name][1]))
                training.settle(loop)
            report.raw[name] = {"events": events, "compiled_later": later, "stats": training.stats_dict(loop)}
        middle = {key: quantiles([event[key] for event in events]) for key in events[0]}
        report.add(
            Row(
                f"{name}: host time of germinating again",
                middle["host_ms"].p50,
                "ms",
                HOST_MS,
                spread=middle["host_ms"],
                note=f"germinate() {middle['call_ms'].p50:.2f} ms + engine {middle['step_host_ms'].p50:.2f} ms in the step; "
                f"the first time {events[0]['host_ms']:.2f} ms; {len(events)} times",
            )
        )
        note = f"{middle['live_ms'].p50:.1f} ms after the call"
        most = {key: max(event[key] for event in events) for key in ("live_steps", "compiled")}
        report.add(Row(f"{name}: live after", most["live_steps"], "steps", STEPS, note=note))
        note = f"{later} later, in workers, for the plan 'whole' of the new morphology"
        report.add(Row(f"{name}: kernels compiled to get there", most["compiled"], "compiles", COMPILES, note=note))
    return report


def grow(loop: training.Loop, site: str) -> dict[str, Any]:
    """Germinate ``low_rank`` at ``site`` and step until it is live.

    Returns:
        ``live_steps`` and ``live_ms`` from the call, ``call_ms``, ``step_host_ms`` (the engine's longest time in one
        of these steps), ``host_ms`` (their sum), ``compiled`` (kernels that workers or the training thread built
        until then).
    """
    model = loop.net
    seed = model.seeds[site]
    at_start = model.stats()
    started = perf_counter()
    seed.germinate("low_rank", rank=8)
    call_ms = (perf_counter() - started) * 1e3
    model.reset_stats()  # the call is counted by itself; what follows is the engine's time in the steps
    live_steps = training.steps_until_live(loop, seed, MOST_STEPS)
    live_ms = (perf_counter() - started) * 1e3
    loop.step()  # the engine books a step's time when the next one begins
    stats = model.stats()
    return {
        "live_steps": live_steps,
        "live_ms": live_ms,
        "call_ms": call_ms,
        "step_host_ms": stats.longest_step_host_ms,
        "host_ms": call_ms + stats.longest_step_host_ms,
        "compiled": _compiles(stats) - _compiles(at_start),
        "compiled_at_start": _compiles(at_start),
    }


def _compiles(stats: EngineStats) -> int:
    """Kernels compiled anywhere: in workers, or by a first call in this process."""
    return stats.kernels_compiled + stats.foreground_compiles
