"""What a benchmark says: rows with a figure, its bar and its aim, the machine they are from, a table and JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.harness import Quantiles

OUT = Path(__file__).parent / "out"


@dataclass(frozen=True)
class Bar:
    """What a figure must hold, and what it should reach. Smaller is better.

    Attributes:
        at_most: The figure is met up to here, inclusive.
        aim: What we want it to be, or None.
    """

    at_most: float
    aim: float | None = None


@dataclass(frozen=True)
class Row:
    """One figure of a benchmark.

    Attributes:
        what: What was measured, with the model's name in front.
        figure: The value; NaN where it never happened, which misses every bar.
        unit: ``"×"`` for a ratio, ``"ms"``, ``"s"``, or what is counted.
        bar: What must hold, or None for a figure that stands beside for comparison.
        spread: p20, p50 and p80, where the figure is the median of many.
        note: A few words beside it.
    """

    what: str
    figure: float
    unit: str
    bar: Bar | None = None
    spread: Quantiles | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """``"aim met"``, ``"met"``, ``"missed"``, or nothing where there is no bar."""
        if self.bar is None:
            return ""
        if math.isnan(self.figure) or self.figure > self.bar.at_most:
            return "missed"
        return "aim met" if self.bar.aim is not None and self.figure <= self.bar.aim else "met"


@dataclass
class Report:
    """All that one benchmark measured.

    Attributes:
        benchmark: Its name.
        rows: The figures, in the order they are printed.
        raw: Whatever else a reader may want to check, JSON-able: samples, statistics, the longest steps.
    """

    benchmark: str
    rows: list[Row] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Append a row; its figure goes to the standard error stream at once, for who waits or has to cut it short."""
        self.rows.append(row)
        print(f"{row.what}: {_number(row.figure)} {row.unit} {row.verdict}", file=sys.stderr, flush=True)

    def to_json(self) -> dict[str, Any]:
        """A dict that ``json`` can write: benchmark, date, machine, rows with verdicts, and the raw measurements."""
        return {
            "benchmark": self.benchmark,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "rows": [_finite(asdict(row)) | {"verdict": row.verdict} for row in self.rows],
            "raw": _finite(self.raw),
        }

    def write(self, path: Path | None = None) -> Path:
        """Write the JSON to ``path``, by default ``benchmarks/out/NAME.json``, and return where it went."""
        path = OUT / f"{self.benchmark}.json" if path is None else path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        return path

    def print(self, console: Console) -> None:
        """Print the machine and the table."""
        table = Table(title=f"benchmarks {self.benchmark}", title_justify="left", caption=_machine_line())
        table.add_column("what")
        for column in ("figure", "p20 / p80", "bar", "aim"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("")
        table.add_column("beside it")
        colours = {"missed": "bold red", "met": "green", "aim met": "bold green", "": "dim"}
        for row in self.rows:
            spread = "" if row.spread is None else f"{_number(row.spread.p20)} / {_number(row.spread.p80)}"
            bar = "" if row.bar is None else f"≤ {_number(row.bar.at_most)}"
            aim = "" if row.bar is None or row.bar.aim is None else _number(row.bar.aim)
            figure = f"{_number(row.figure)} {row.unit}"
            verdict = f"[{colours[row.verdict]}]{row.verdict}[/]" if row.verdict else ""
            table.add_row(escape(row.what), figure, spread, bar, aim, verdict, escape(row.note))
        console.print(table)


def _number(value: float) -> str:
    """Four significant digits, without trailing zeros; what is tiny with an exponent, and two digits."""
    if math.isnan(value):
        return "never"
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    if value == 0 or abs(value) >= 1000:
        return f"{value:.0f}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null, everything else stays."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, str | int]:
    """What the figures depend on besides the code. No host name, user or path: reports get published."""
    return {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "esper_fx": _version("esper-fx"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _machine_line() -> str:
    facts = machine()
    threads, cores = facts["torch_threads"], facts["cores"]
    return (
        f"{facts['cpu']} ({facts['cpu_capability']}), {cores} cores, {threads} torch threads, {facts['device']}; "
        f"Python {facts['python']}, torch {facts['torch']}, esper_fx {facts['esper_fx']}"
    )
