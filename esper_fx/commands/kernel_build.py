"""`esper-fx kernels build`: compile all kernels for GPUs that need not be here, report what they use, and store them."""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from esper_fx.cache import ArtifactStore
from esper_fx.errors import MissingDependencyError
from esper_fx.kernels.build import Built, build, plan
from esper_fx.kernels.build_cases import BuildCase, build_cases
from esper_fx.kernels.resources import excesses
from esper_fx.kernels.targets import parse_targets
from esper_fx.prebuilt import put_binaries
from esper_fx.settings import settings

_LEAST_TRITON = (3, 6)
_MOST_PROCESSES = 8
_TABLE_WIDTH = 150


@dataclass(frozen=True)
class Row:
    """A kernel compiled for a target, as it is reported.

    Attributes:
        kernel: File and name: ``low_rank.forward_kernel``.
        dtype: Of the example call that it was compiled for.
        label: Which of the file's example calls that was.
        target: What it was compiled for.
        default: Whether it runs unless a configuration was chosen.
        registers: Registers per thread; this and the next three are 0 for a kernel that does not compile.
        spilled: Bytes per thread that do not fit the registers.
        shared: Bytes of shared memory.
        nbytes: Bytes of the binary.
        seconds: How long it took.
        problems: What is wrong with it.
    """

    kernel: str
    dtype: str
    label: str
    target: str
    default: bool
    registers: int
    spilled: int
    shared: int
    nbytes: int
    seconds: float
    problems: tuple[str, ...]


def build_kernels(
    targets: str,
    store: ArtifactStore,
    *,
    cases: Sequence[BuildCase] | None = None,
    processes: int | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Compile kernels for targets and store the binaries that such a GPU can load.

    Args:
        targets: Names with commas in between: ``cuda:90,hip:gfx942``.
        store: Where the binaries go.
        cases: What to compile; None is all that there is.
        processes: How many at a time; None is one for each processor, 8 at most.
        console: Where progress is shown; None shows none.

    Returns:
        What became of each kernel, by target and kernel.

    Raises:
        TargetError: A target is not known.
        MissingDependencyError: There is no triton, or it is too old.
        KernelBuildError: A process that compiles died.
        StoreError: Binaries could not be written.
    """
    wanted = parse_targets(targets)
    require_triton()
    jobs = plan(list(build_cases()) if cases is None else cases, wanted)
    finished = build(jobs, processes or min(_MOST_PROCESSES, len(os.sched_getaffinity(0))))
    shown = track(finished, "compiling", total=len(jobs), console=console, transient=True, disable=console is None)
    done = {built.job: built for built in shown}
    rows, loadable = [], defaultdict(list)
    for job, needed_by in jobs.items():  # in the order of the cases, not in the order in which they were finished
        row = _row(done[job], needed_by)
        rows.append(row)
        built = done[job]
        if built.binary and built.identity and built.resources and not excesses(built.resources, job.target):
            loadable[tuple(sorted(built.identity.items()))].append(built.binary)
    for identity, binaries in loadable.items():
        put_binaries(store, dict(identity), binaries)
    return rows


def run_build(console: Console, targets: str, *, processes: int | None, cache_dir: Path | None) -> int:
    """Build all kernels, print what they use, and return the exit status: 1 if one is bad."""
    started = time.perf_counter()
    store = ArtifactStore(cache_dir or settings().cache_dir)
    rows = build_kernels(targets, store, processes=processes, console=console)
    if not console.is_terminal:  # a log has no width
        console.width = max(console.width, _TABLE_WIDTH)
    console.print(table(rows))
    bad = [row for row in rows if row.problems]
    for row in bad:
        where = f"{row.target} {row.kernel} {row.dtype} {row.label}"
        console.print(f"[bold red]{escape(where)}:[/bold red] {escape('; '.join(row.problems))}", soft_wrap=True)
    size, took = sum(row.nbytes for row in rows) / 1e6, time.perf_counter() - started
    work = sum(os.times()[:4])  # this process and those that compiled, which have ended
    console.print(
        f"{len(rows)} kernels, {len(bad)} bad, {size:.1f} MB, {took:.0f} s ({work:.0f} s of processor time); in {store.root}",
        soft_wrap=True,
        highlight=False,
    )
    return 1 if bad else 0


def table(rows: Sequence[Row]) -> Table:
    """The rows as they are printed."""
    result = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("target", "kernel", "dtype", "case"):
        result.add_column(name, no_wrap=True)
    for name in ("registers", "spilled", "shared", "binary", "seconds"):
        result.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        numbers = (f"{row.registers}", f"{row.spilled}", f"{row.shared}", f"{row.nbytes}", f"{row.seconds:.1f}")
        label = f"{row.label}{' (default)' if row.default else ''}"
        style = "red" if row.problems else None
        result.add_row(row.target, row.kernel, row.dtype, label, *numbers, style=style)
    return result


def require_triton() -> None:
    """Make sure that there is a triton that can compile our kernels.

    Raises:
        MissingDependencyError: There is none, or it is too old.
    """
    least = ".".join(map(str, _LEAST_TRITON))
    try:
        import triton
    except ImportError as error:
        raise MissingDependencyError(
            f'kernels are compiled by triton, which is not installed: pip install "triton>={least}" (on Linux)'
        ) from error
    if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < _LEAST_TRITON:
        raise MissingDependencyError(
            f'triton {triton.__version__} is too old, expected {least} or newer: pip install "triton>={least}"'
        )


def _row(built: Built, cases: Sequence[BuildCase]) -> Row:
    default = any(case.default for case in cases)
    problems = []
    if built.problem is not None:
        problems.append(f"does not compile: {built.problem}")
    if built.resources is not None:
        problems += excesses(built.resources, built.job.target)
        if default and built.resources.spilled:
            problems.append(f"spills {built.resources.spilled} bytes per thread in a default configuration")
    module, _, name = built.job.kernel.partition(":")
    return Row(
        kernel=f"{module.rpartition('.')[2]}.{name}",
        dtype=str(cases[0].dtype).removeprefix("torch."),
        label=cases[0].label,
        target=built.job.target.name,
        default=default,
        registers=built.resources.registers if built.resources else 0,
        spilled=built.resources.spilled if built.resources else 0,
        shared=built.resources.shared if built.resources else 0,
        nbytes=len(built.binary.code) if built.binary else 0,
        seconds=built.seconds,
        problems=tuple(problems),
    )
