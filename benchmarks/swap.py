"""Growing while training: the longest step around a first germination, against a plain torch.compile recompile."""

from __future__ import annotations

from typing import Any

from benchmarks import child
from benchmarks.harness import median, quantiles
from benchmarks.options import Options
from benchmarks.report import Bar, Report, Row

LONGEST = Bar(at_most=2.5, aim=1.5)
HOST_MS = Bar(at_most=5.0, aim=1.0)
LIVE = Bar(at_most=4.0, aim=2.0)
AFTER = 20


def run(options: Options) -> Report:
    """Each event in a fresh process whose store and Inductor cache hold the model as it is, and nothing of the change.

    The event is repeated, and the median of its figures is reported: one sudden load on a shared machine is one
    longest step.
    """
    report = Report("swap")
    steps, repeats = (20, 1) if options.quick else (100, 3)
    for name in options.models:
        common: dict[str, Any] = {"model": name, "seed": options.seed}
        watched = common | {"steps": steps, "after": AFTER}
        grown, idle = [], []
        with child.fresh_folders() as base:
            child.call("benchmarks.events:prepare", common, environment=base)
            for _ in range(repeats):
                with child.fresh_folders(base) as folders:
                    grown.append(child.call("benchmarks.events:grow_running", watched, environment=folders))
                with child.fresh_folders(base) as folders:
                    idle.append(child.call("benchmarks.events:grow_idle", common, environment=folders))
        with child.fresh_folders() as folders:
            plain = child.call("benchmarks.events:grow_plain", watched, environment=folders)
        for row in rows(name, grown, idle, plain):
            report.add(row)
        report.raw[name] = {"grown": grown, "idle": idle, "plain": plain}
    return report


def rows(name: str, grown: list[dict[str, Any]], idle: list[dict[str, Any]], plain: dict[str, Any]) -> list[Row]:
    """The figures of one model from what the processes brought back: one event each, and the same event when idle."""
    longest = [max(event["event_s"]) / median(event["before_s"]) for event in grown]
    before = [median(event["before_s"]) for event in grown]
    quiet = [max(event["before_s"]) / median(event["before_s"]) for event in grown]
    during = [median(event["event_s"]) / median(event["before_s"]) for event in grown]
    live = [event["live_s"] / median([other["idle_s"] for other in idle]) for event in grown]
    plain_before = median(plain["before_s"])
    return [
        Row(
            f"{name}: longest step of the event / median before",
            median(longest),
            "×",
            LONGEST,
            spread=quantiles(longest),
            note=f"{_each(longest)}; {median(before) * 1e3:.0f} ms before, {len(grown[0]['event_s'])} steps",
        ),
        Row(
            f"{name}: longest quiet step / median quiet step",
            median(quiet),
            "×",
            spread=quantiles(quiet),
            note=f"the machine's own unrest, {len(grown[0]['before_s'])} steps before the event",
        ),
        Row(
            f"{name}: median step during the event / before",
            median(during),
            "×",
            spread=quantiles(during),
            note=f"longest gc pause {max(event['gc_pause_ms'] for event in grown):.0f} ms",
        ),
        Row(
            f"{name}: the same by plain torch.compile",
            max(plain["event_s"]) / plain_before,
            "×",
            note=f"{max(plain['event_s']):.1f} s of {plain_before * 1e3:.1f} ms",
        ),
        Row(
            f"{name}: engine's time in any one training step",
            max(event["host_ms"] for event in grown),
            "ms",
            HOST_MS,
            note=f"germinate() itself {max(event['call_ms'] for event in grown):.2f} ms",
        ),
        Row(
            f"{name}: germinate() to live, training / idle",
            median(live),
            "×",
            LIVE,
            spread=quantiles(live),
            note=f"{_seconds(grown, 'live_s')} / {_seconds(idle, 'idle_s')}; plan whole after "
            f"{_seconds(grown, 'takeover_s')} / {_seconds(idle, 'idle_takeover_s')}; "
            f"{grown[0]['compiled']} kernels compiled",
        ),
    ]


def _each(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _seconds(events: list[dict[str, Any]], name: str) -> str:
    return f"{median([event[name] for event in events]):.1f} s"
