"""`esper-fx demo`: puts the parts together."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from esper_fx.demo import plot, report
from esper_fx.demo.growth import Run
from esper_fx.demo.task import parameter_count
from esper_fx.demo.text import text_task
from esper_fx.demo.vision import digits_task

_REFRESH_S = 0.2
_LIMIT_S = 60.0


def run_demo(
    console: Console, *, text: bool, steps: int | None, seed: int, output: Path | None, control: bool = True
) -> Path | None:
    """Run a demo and print its report.

    Args:
        console: Where to print.
        text: The text demo instead of the images.
        steps: Planned training steps; None is the demo's own number.
        seed: Of weights and order of data.
        output: Folder of the picture; None draws none.
        control: Whether to train the network once more without growth, to compare.

    Returns:
        Path of the picture.

    Raises:
        DemoError: Something is missing, or a growth did not come to life.
    """
    started = time.perf_counter()
    if output is not None:
        plot.check_available()
    task = text_task(seed) if text else digits_task(seed)
    console.print(f"[bold]{task.title}[/bold]: {parameter_count(task.net):,} parameters", highlight=False)
    with _a_processor_left() as threads, Screen(console) as screen:
        console.print(f"torch {torch.__version__}, {threads} threads", style="dim", highlight=False)
        limit_s = _LIMIT_S if steps is None else None
        run = Run(task, steps=steps or task.steps, seed=seed, watcher=screen, limit_s=limit_s)
        run.start()
        run.train()
        if control:
            run.train_without()
    report.print_report(console, task, run.record, run.model.stats())
    path = None
    if output is not None:
        path = output / ("text.png" if text else "digits.png")
        plot.draw(run.record, task, path)
        console.print(f"picture: {path}", highlight=False)
    console.print(f"took {time.perf_counter() - started:.0f} s", style="dim", highlight=False)
    return path


@contextmanager
def _a_processor_left() -> Iterator[int]:
    """Inside, one processor is left to the compiler; so small a network is no faster with all of them.

    Whoever sets OMP_NUM_THREADS has decided otherwise.
    """
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(before, (os.cpu_count() or 1) - 1)))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


class Screen:
    """The progress bar, and lines above it. Drawn between steps, never by a thread beside them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._progress.add_task("compiling the first step", total=None)
        self._drawn = 0.0

    def __enter__(self) -> Screen:
        self._progress.__enter__()
        self._progress.refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, markup=False)

    def stepped(self, done: int, planned: int, doing: str) -> None:
        """Move the bar, a few times a second."""
        now = time.monotonic()
        if now - self._drawn >= _REFRESH_S or done == planned:
            self._drawn = now
            self._progress.update(self._task, completed=done, total=planned, description=doing, refresh=True)
