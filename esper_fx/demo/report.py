"""Prints a run: what growth did, and what every event cost."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from esper_fx import EngineStats
from esper_fx.demo.record import Event, Record, longest_step, steady_seconds, steady_steps, steps_per_second
from esper_fx.demo.task import Task


def print_report(console: Console, task: Task, record: Record, stats: EngineStats) -> None:
    """Print both tables."""
    console.print()
    console.print(growth_table(task, record, stats))
    console.print(event_table(record))
    console.print(
        "longest step: from the event until 20 steps after its last kernel took over, calls to esper_fx included; "
        f"the median step before the first event took {steady_seconds(record) * 1e3:.1f} ms.",
        style="dim",
    )


def growth_table(task: Task, record: Record, stats: EngineStats) -> Table:
    """What growth did to the network, and what the engine did for it."""
    table = Table(title="What growth did", title_justify="left", show_header=False, box=SIMPLE_HEAD)
    table.add_column("what")
    table.add_column("measured")
    accuracies, parameters = record.accuracies, record.parameters
    table.add_row("accuracy measured on", task.score)
    table.add_row("accuracy before growth", f"{accuracies['before']:.1%}   ({parameters['before']:,} parameters)")
    table.add_row(
        "accuracy after growth", f"[bold]{accuracies['after']:.1%}[/bold]   ({parameters['after']:,} parameters)"
    )
    if "without growth" in accuracies:
        table.add_row("trained as long without growth", f"{accuracies['without growth']:.1%}")
    table.add_section()
    table.add_row("steps per second before", f"{steps_per_second(steady_steps(record)):.0f}")
    waiting = [
        step for event in record.events if event.live is not None for step in record.steps[event.step : event.live]
    ]
    if waiting:
        table.add_row("steps per second meanwhile", f"{steps_per_second(waiting):.0f}")
    table.add_row("steps per second after", f"{steps_per_second(record.steps[record.marks['after'] :]):.0f}")
    table.add_section()
    table.add_row("compiled before step 1", _compiled(stats.foreground_compiles, stats.foreground_compile_seconds))
    table.add_row("compiled beside training", _compiled(stats.kernels_compiled, stats.compile_seconds))
    table.add_row("engine's own time, worst step", f"{stats.longest_step_host_ms:.1f} ms, on the training thread")
    table.add_row("Dynamo recompiles", f"{stats.recompiles}")
    if stats.cache is not None:
        table.add_row(
            "kernel cache",
            f"{stats.cache.entries} kernels ({stats.cache.bytes / 1e6:.1f} MB), {stats.cache.hits} hits, "
            f"{stats.cache.misses} misses, {stats.kernels_loaded} loaded from disk, {stats.cache.evictions} evicted",
        )
    plans = sorted({_PLANS.get(plan, plan) for plan in stats.plans})
    table.add_row("the network runs as", ", ".join(plans) or _PLANS["eager"])
    return table


def event_table(record: Record) -> Table:
    """What every event cost the training loop."""
    table = Table(
        title="What it cost: events while training went on", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("")
    table.add_column("event", no_wrap=True)
    table.add_column("site", no_wrap=True)
    table.add_column("step", justify="right")
    table.add_column("live after", justify="right")
    table.add_column("longest step", justify="right")
    table.add_column("x median", justify="right")
    median = steady_seconds(record)
    for number, event in enumerate(record.events, 1):
        longest = longest_step(record, event).seconds
        table.add_row(
            str(number),
            event.what,
            event.site,
            f"{event.step:,}",
            _live(event),
            f"{longest * 1e3:.1f} ms",
            f"{longest / median:.1f}",
        )
    return table


_PLANS = {"whole": "one kernel for the whole network", "blocks": "one kernel per block", "eager": "eager mode"}


def _live(event: Event) -> str:
    return "at once" if event.live_seconds is None else f"{event.live_seconds:.1f} s"


def _compiled(kernels: int, seconds: float) -> str:
    return f"{seconds:.1f} s ({kernels} kernels)" if kernels else "nothing: every kernel was there"
