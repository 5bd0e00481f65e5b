"""Draws a run: loss, alpha and step time over the steps, with the events marked."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from esper_fx.demo.record import Event, Record, smooth
from esper_fx.demo.task import DemoError, Task

_NAMES_PER_ROW = 4
_TRIALS = ("tab:blue", "tab:orange")


def check_available() -> None:
    """Raises DemoError where matplotlib is not installed: better before training than after."""
    if find_spec("matplotlib") is None:
        raise DemoError('the picture needs matplotlib: pip install "esper-fx[demo]", or run with --no-plot')


def draw(record: Record, task: Task, path: Path) -> None:
    """Write the picture to `path` (PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    losses, alphas, times = figure.subplots(3, 1, sharex=True)
    # The first step holds the compilation and would dwarf all others.
    steps = range(1, len(record.steps))

    values = [step.loss for step in record.steps]
    losses.plot(steps, values[1:], color="0.8", linewidth=0.8)
    losses.plot(steps, smooth(values)[1:], color="black", label="mean of 50 steps")
    losses.set_ylabel("training loss (nats)")
    losses.legend(loc="upper right")

    for index, (trial, color) in enumerate(zip(task.trials, _TRIALS, strict=True)):
        row = [record.steps[step].alphas[index] for step in steps]
        alphas.plot(steps, row, color=color, label=f"{trial.blueprint} at {trial.site}")
    alphas.set_ylabel("alpha of the seed")
    alphas.set_ylim(-0.05, 1.1)
    alphas.legend(loc="upper left")

    times.plot(steps, [record.steps[step].seconds * 1e3 for step in steps], ".", color="0.4", markersize=2)
    times.set_yscale("log")
    times.set_ylabel("step time (ms)")
    times.set_xlabel("training step")

    colors = {trial.site: color for trial, color in zip(task.trials, _TRIALS, strict=True)}
    for axes in (losses, alphas, times):
        for event in record.events:
            axes.axvline(event.step, color=colors[event.site], linewidth=0.8, linestyle=_line(event))
            if event.live is not None:
                axes.axvline(event.live, color=colors[event.site], linewidth=0.8)
    for number, event in enumerate(record.events, 1):
        losses.annotate(
            str(number),
            (event.step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right" if number % 2 else "left",
            color=colors[event.site],
        )
    names = [f"{number} {event.what}" for number, event in enumerate(record.events, 1)]
    rows = ["    ".join(names[start : start + _NAMES_PER_ROW]) for start in range(0, len(names), _NAMES_PER_ROW)]
    figure.suptitle("\n".join([task.title, *rows]), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _line(event: Event) -> str:
    """Dashed until live; events that are live at once are solid."""
    return "--" if event.live is not None else "-"
