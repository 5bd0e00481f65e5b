"""`esper-fx doctor`: does this machine have what esper_fx needs, and what to do where it does not."""

from __future__ import annotations

import enum
import importlib
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from esper_fx.errors import EsperError

_LEAST_PYTHON = (3, 11)
_LEAST_TORCH = (2, 11)
_WORKER_TIMEOUT_S = 120
_LITTLE_SPACE = 1 << 30


class Status(enum.Enum):
    """How a check ended: `WARN` leaves something out or makes it slower, `FAIL` breaks the main job."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: What was looked at.
        status: How it ended.
        found: What is there.
        advice: What to do; empty where nothing needs doing.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


def diagnose() -> Iterator[Check]:
    """Run all checks, quick ones first; none of them raises."""
    checks: tuple[Callable[[], Iterator[Check]], ...] = (
        check_python,
        check_torch,
        check_compiler,
        check_triton_and_gpu,
        check_cache_folder,
        check_worker,
        check_demo,
    )
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            name = check.__name__.removeprefix("check_").replace("_", " ")
            yield Check(name, Status.FAIL, f"{type(error).__name__}: {error}", "this is a bug in the check: report it")


def print_checks(console: Console, checks: Iterator[Check]) -> int:
    """Print a table of the checks; returns the exit status: 1 if one failed, else 0."""
    colors = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}
    table = Table(title="esper-fx doctor", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("check", no_wrap=True)
    table.add_column("found")
    done: list[Check] = []
    with console.status("checking"):
        for check in checks:
            done.append(check)
            table.add_row(f"[{colors[check.status]}]{check.status.value}", check.name, escape(check.found))
    console.print(table)
    for check in done:
        if check.advice:
            color = colors[check.status]
            console.print(f"[{color}]{check.status.value}[/] {check.name}: {escape(check.advice)}", highlight=False)
    failed = sum(check.status is Status.FAIL for check in done)
    warned = sum(check.status is Status.WARN for check in done)
    console.print(
        "Everything that esper_fx needs is here."
        if not failed and not warned
        else f"{failed} failed, {warned} to look at." + ("" if failed else " esper_fx will work."),
        highlight=False,
    )
    return 1 if failed else 0


def check_python() -> Iterator[Check]:
    """The interpreter's version."""
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] < _LEAST_PYTHON:
        yield Check("Python", Status.FAIL, found, "install Python 3.11 or newer and reinstall esper-fx with it")
    else:
        yield Check("Python", Status.OK, found)


def check_torch() -> Iterator[Check]:
    """PyTorch's version."""
    advice = 'pip install "torch>=2.11"'
    try:
        found = version("torch")
    except PackageNotFoundError:
        yield Check("PyTorch", Status.FAIL, "not installed", advice)
        return
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    yield Check("PyTorch", *((Status.OK, found) if numbers >= _LEAST_TORCH else (Status.FAIL, found, advice)))


def check_compiler() -> Iterator[Check]:
    """The C++ compiler that Inductor would use must build a program that runs, with OpenMP and Python's headers."""
    from esper_fx import _torch
    from esper_fx.commands import toolchain

    try:
        compiler = _torch.cpp_compiler()
    except RuntimeError as error:
        yield Check(
            "C++ compiler",
            Status.FAIL,
            str(error).splitlines()[0],
            f"{toolchain.how_to_get_one()}, or name yours in CXX; until then models run eagerly, not compiled",
        )
        return
    output, problem = toolchain.build_and_run(compiler, toolchain.PROGRAM, [])
    if problem is None and output != toolchain.PROGRAM_SAYS:
        problem = f"its program printed {output!r}, expected {toolchain.PROGRAM_SAYS!r}"
    if problem is not None:
        advice = f"{toolchain.how_to_get_one()}, or name another in CXX"
        yield Check("C++ compiler", Status.FAIL, f"{compiler}: {problem}", advice)
        return
    yield Check("C++ compiler", Status.OK, f"{toolchain.describe(compiler)}, builds and runs a program")

    output, problem = toolchain.build_and_run(compiler, toolchain.OPENMP_PROGRAM, toolchain.openmp_flags())
    if problem is None:
        yield Check("OpenMP", Status.OK, f"threads started: {output} processors")
    else:
        missing = (
            "brew install libomp" if sys.platform == "darwin" else "install your compiler's OpenMP library (libgomp)"
        )
        yield Check("OpenMP", Status.FAIL, problem, missing)

    include = sysconfig.get_path("include")
    _, problem = toolchain.build_and_run(compiler, toolchain.HEADERS_PROGRAM, ["-I", include], link=False)
    if problem is None:
        yield Check("Python headers", Status.OK, include)
    else:
        advice = (
            f"install them: on Debian and Ubuntu apt install python3.{sys.version_info[1]}-dev, on Fedora python3-devel"
        )
        yield Check("Python headers", Status.FAIL, f"{include}: {problem}", advice)


def check_triton_and_gpu() -> Iterator[Check]:
    """A GPU is optional; Triton is needed where there is one."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        found = str(importlib.import_module("triton").__version__)
    except ImportError as error:
        if count:
            advice = (
                "a GPU cannot be compiled for without it: reinstall PyTorch from its own wheels, or pip install triton"
            )
            yield Check("Triton", Status.FAIL, str(error), advice)
        else:
            yield Check("Triton", Status.OK, "not installed; only needed with a GPU")
    else:
        yield Check("Triton", Status.OK, found)
    if count:
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
        yield Check("GPU", Status.OK, names)
    elif torch.version.cuda is not None and shutil.which("nvidia-smi"):
        advice = "the driver may be older than this PyTorch build needs: compare nvidia-smi with PyTorch's install page"
        yield Check("GPU", Status.WARN, "nvidia-smi is here, but PyTorch sees no GPU", advice)
    else:
        yield Check("GPU", Status.OK, "none; the CPU is used")


def check_cache_folder() -> Iterator[Check]:
    """The folder where compiled kernels are kept between runs."""
    from esper_fx import ArtifactStore, StoreError, settings
    from esper_fx.prebuilt import KIND

    if not settings().store:
        advice = "unset ESPER_FX_STORE to keep compiled kernels between runs"
        yield Check("kernel store", Status.WARN, "switched off", advice)
        return
    try:
        store = ArtifactStore(settings().cache_dir)
        entries, size = store.entries(), store.size_bytes()
    except StoreError as error:
        advice = "repair that folder, or set ESPER_FX_CACHE_DIR to one that only you can write to"
        yield Check("kernel store", Status.FAIL, str(error), advice)
        return
    found = f"{store.root}: {len(entries)} kernels, {size / 1e6:.1f} MB"
    ahead = sorted({str(each.metadata["target"]) for each in entries if each.metadata.get("kind") == KIND})
    if ahead:
        found += f", built ahead for {', '.join(ahead)}"
    free = shutil.disk_usage(store.root).free
    if free < _LITTLE_SPACE:
        advice = "free some space, or set ESPER_FX_CACHE_DIR to a folder on a larger disk"
        yield Check("kernel store", Status.WARN, f"{found}; only {free / 1e6:.0f} MB left on that disk", advice)
    else:
        yield Check("kernel store", Status.OK, found)


def check_worker() -> Iterator[Check]:
    """A worker process must start, import what the user's script could, and answer."""
    from esper_fx import KernelCompiler, settings
    from esper_fx.cache import Job

    wanted = settings().workers
    if wanted == 0:
        advice = "set ESPER_FX_WORKERS to 1 or more: without one, grown modules run eagerly"
        yield Check("compile worker", Status.WARN, "switched off", advice)
        return
    compiler = KernelCompiler(workers=1, nice=0)
    try:
        job = compiler.submit(Job(f"{__name__}:answer", str(os.getpid()).encode()))
        result = job.result(_WORKER_TIMEOUT_S)
    except (EsperError, OSError, TimeoutError, CancelledError) as error:
        advice = "processes that this one starts must be able to run and to import esper_fx: check limits and sandboxes"
        yield Check("compile worker", Status.FAIL, f"{type(error).__name__}: {error}", advice)
    else:
        niceness = f"niceness {settings().worker_nice}"
        yield Check(
            "compile worker", Status.OK, f"process {result.data.decode()} answered; {wanted} at {niceness} in use"
        )
    finally:
        compiler.close()


def check_demo() -> Iterator[Check]:
    """What only the demo needs."""
    missing = []
    for package in ("matplotlib", "scikit-learn"):
        try:
            version(package)
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        yield Check("demo", Status.WARN, f"{' and '.join(missing)} not installed", 'pip install "esper-fx[demo]"')
    else:
        yield Check("demo", Status.OK, "matplotlib and scikit-learn are installed")


def answer(payload: bytes) -> bytes:
    """What the worker runs: says its process id, if it is another than the one in the payload."""
    pid = str(os.getpid()).encode()
    if pid == payload:
        raise RuntimeError("the job ran in the process that asked for it")
    return pid
