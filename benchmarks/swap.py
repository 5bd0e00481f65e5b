"""Growing while training: the longest step around a first germination, against a plain torch.compile recompile."""

from __future__ import annotations

from typing import Any

from benchmarks import child
from benchmarks.harness import median, quantile
from benchmarks.options import Options
from benchmarks.report import Bar, Report, Row

LONGEST = Bar(at_most=2.5, aim=1.5)
HOST_MS = Bar(at_most=5.0, aim=1.0)
LIVE = Bar(at_most=4.0, aim=2.0)
AFTER = 20


def run(options: Options) -> Report:
    """Each event in a fresh process with an empty store and an empty Inductor cache, so that it truly is the first."""
    report = Report("swap")
    steps = 20 if options.quick else 100
    for name in options.models:
        common: dict[str, Any] = {"model": name, "seed": options.seed}
        with child.fresh_folders() as folders:
            grown = child.call(
                "benchmarks.events:grow_running", common | {"steps": steps, "after": AFTER}, environment=folders
            )
        with child.fresh_folders() as folders:
            idle = child.call("benchmarks.events:grow_idle", common, environment=folders)
        with child.fresh_folders() as folders:
            plain = child.call(
                "benchmarks.events:grow_plain", common | {"steps": steps, "after": AFTER}, environment=folders
            )
        for row in rows(name, grown, idle, plain):
            report.add(row)
        report.raw[name] = {"grown": grown, "idle": idle, "plain": plain}
    return report


def rows(name: str, grown: dict[str, Any], idle: dict[str, Any], plain: dict[str, Any]) -> list[Row]:
    """The figures of one model from what the three processes brought back."""
    before = median(grown["before_s"])
    event = grown["event_s"]
    plain_before = median(plain["before_s"])
    worst = grown["longest"][0]
    return [
        Row(
            f"{name}: longest step of the event / median before",
            max(event) / before,
            "×",
            LONGEST,
            note=f"{max(event) * 1e3:.1f} ms of {before * 1e3:.1f} ms, step {worst['step']} of {len(event)}",
        ),
        Row(
            f"{name}: longest quiet step / median quiet step",
            max(grown["before_s"]) / before,
            "×",
            note=f"the machine's own unrest, {len(grown['before_s'])} steps before the event",
        ),
        Row(
            f"{name}: median step during the event / before",
            median(event) / before,
            "×",
            note=f"p99 {quantile(event, 0.99) / before:.2f} ×; longest gc pause {grown['gc_pause_ms']:.0f} ms",
        ),
        Row(
            f"{name}: the same by plain torch.compile",
            max(plain["event_s"]) / plain_before,
            "×",
            note=f"{max(plain['event_s']):.1f} s of {plain_before * 1e3:.1f} ms",
        ),
        Row(
            f"{name}: engine's time in any one training step",
            grown["host_ms"],
            "ms",
            HOST_MS,
            note=f"germinate() itself {grown['call_ms']:.2f} ms",
        ),
        Row(
            f"{name}: germinate() to live, training / idle",
            grown["live_s"] / idle["idle_s"],
            "×",
            LIVE,
            note=f"{grown['live_s']:.1f} s / {idle['idle_s']:.1f} s; plan whole after {grown['takeover_s']:.1f} s "
            f"/ {idle['idle_takeover_s']:.1f} s; {grown['compiled']} kernels compiled",
        ),
    ]
