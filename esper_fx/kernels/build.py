"""Compile kernels for GPUs that are not here, several at a time in processes of their own."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from esper_fx.errors import KernelBuildError
from esper_fx.kernels.build_cases import BuildCase
from esper_fx.kernels.launch import find_kernel, kernel_name
from esper_fx.kernels.prebuilt import Binary
from esper_fx.kernels.resources import Resources, registers_of_amdgcn, registers_of_ptxas
from esper_fx.kernels.targets import Target

# What Triton notes with a binary and is a path on the machine that compiled it.
_PATHS = ("extern_libs",)
# What a compiler writes where something is wrong, how much of it is shown, and how the file's name ends where it is kept.
_ERROR = re.compile(r"\berror:|Assertion .* failed|LLVM ERROR", re.IGNORECASE)
_MESSAGE_LENGTH = 300
_SAID = ".said"


@dataclass(frozen=True)
class Job:
    """A kernel to compile for a target, as data that another process can read.

    Attributes:
        kernel: Module and name: ``esper_fx.kernels.low_rank:forward_kernel``.
        args: Dtypes of its tensors, and its numbers.
        constants: Names and values of its ``tl.constexpr`` parameters and of Triton's options.
        target: What to compile for.
    """

    kernel: str
    args: tuple[Any, ...]
    constants: tuple[tuple[str, Any], ...]
    target: Target


@dataclass(frozen=True)
class Built:
    """How a job ended.

    Attributes:
        job: The job.
        seconds: How long it took.
        problem: Why it could not be compiled; None if it was. The other fields are None then.
        identity: What binaries of this kernel depend on besides arguments and options.
        binary: The compiled kernel.
        resources: What it uses.
    """

    job: Job
    seconds: float
    problem: str | None = None
    identity: dict[str, str] | None = None
    binary: Binary | None = None
    resources: Resources | None = None


def plan(cases: Iterable[BuildCase], targets: Iterable[Target]) -> dict[Job, list[BuildCase]]:
    """The jobs that compile these cases for these targets, each with the cases that need it."""
    launches = [(case, launch) for case in cases for launch in case.launches()]
    jobs: dict[Job, list[BuildCase]] = {}
    for target in targets:
        for case, launch in launches:
            if not case.runs_on(target):
                continue
            args = tuple(arg.dtype if isinstance(arg, torch.Tensor) else arg for arg in launch.args)
            jobs.setdefault(
                Job(kernel_name(launch.kernel), args, tuple(sorted(launch.constants.items())), target), []
            ).append(case)
    return jobs


def build(jobs: Iterable[Job], processes: int) -> Iterator[Built]:
    """Compile, in no particular order.

    A kernel that brings its process down, as an assertion that fails within LLVM does, is found by compiling what is left
    one after the other, and reported as one that does not compile.

    Args:
        jobs: What to compile.
        processes: How many at a time.

    Raises:
        KernelBuildError: No process could compile anything.
    """
    left, finished, alone = dict.fromkeys(jobs), 0, False
    while left:
        with tempfile.TemporaryDirectory(prefix="esper-fx-kernels-") as folder:
            for built in _build(list(left), 1 if alone else processes, folder):
                finished += 1
                del left[built.job]
                yield built
            if not left:
                return
            if alone:  # one process takes them in order
                said = "".join(path.read_text(errors="replace") for path in Path(folder).glob(f"*{_SAID}"))
                if not finished:
                    raise KernelBuildError(
                        f"no process that compiles kernels lives: {_first_error(said) or 'no message'}"
                    )
                culprit = next(iter(left))
                del left[culprit]
                yield Built(culprit, 0.0, problem=f"the compiler crashed: {_first_error(said) or 'no message'}")
        alone = not alone


def _build(jobs: Sequence[Job], processes: int, folder: str) -> Iterator[Built]:
    """Compile until all are done or a process dies."""
    # Spawned, not forked: Triton reads the environment, and PyTorch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(folder,)) as pool:
        try:
            for done in as_completed([pool.submit(compile_job, job) for job in jobs]):
                if not isinstance(done.exception(), BrokenProcessPool):
                    yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(folder: str) -> None:
    os.environ |= {"TRITON_CACHE_DIR": folder, "TRITON_INTERPRET": "0"}
    end_with_parent()


def end_with_parent() -> None:
    """Let this process end when its parent does: one of a pool, whose parent was killed, would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def compile_job(job: Job) -> Built:
    """Compile one kernel. For processes that only compile."""
    from esper_fx.kernels import _triton

    started = time.perf_counter()
    target = _triton.gpu_target(job.target)
    kernel = find_kernel(job.kernel)
    with _native_errors() as said:
        try:
            compiled, options, log = _triton.compile_for(target, kernel, job.args, dict(job.constants))
        except Exception as error:  # whatever Triton raises, the other kernels are built
            return Built(job, time.perf_counter() - started, problem=_message(error, said()))
    metadata = compiled.metadata._asdict() | {"target": vars(compiled.metadata.target)}
    registers, spilled = (
        registers_of_ptxas(log) if job.target.backend == "cuda" else registers_of_amdgcn(compiled.asm["amdgcn"])
    )
    resources = Resources(
        registers, spilled, metadata["shared"], metadata.get("tmem_size") or 0, warps=metadata["num_warps"]
    )
    binary = Binary(
        compiled.src.name,
        compiled.src.hash(),
        _without_paths(json.loads(options)),
        _without_paths(metadata),
        compiled.kernel,
    )
    return Built(
        job,
        time.perf_counter() - started,
        identity=_triton.identity(kernel, target),
        binary=binary,
        resources=resources,
    )


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in _PATHS}


def _message(error: Exception, said: str) -> str:
    """What is wrong: the first error that the compiler wrote, or else first and last line of what the exception comes from."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    told = " … ".join(dict.fromkeys(lines[:1] + lines[-1:]))  # in between Triton shows source
    return f"{type(error).__name__}: {(_first_error(said) or told)[:_MESSAGE_LENGTH]}"


def _first_error(said: str) -> str:
    """The first line of what the compiler wrote that tells of an error; empty where none does."""
    return next((line.strip()[:_MESSAGE_LENGTH] for line in said.splitlines() if _ERROR.search(line)), "")


@contextlib.contextmanager
def _native_errors() -> Iterator[Callable[[], str]]:
    """Collect what the compiler writes to the standard error stream, which may be pages, instead of showing it.

    It goes into Triton's cache folder, where it is found after a crash.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    path = Path(os.environ["TRITON_CACHE_DIR"], f"{os.getpid()}{_SAID}")
    with path.open("w") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: path.read_text(errors="replace")
        finally:
            os.dup2(kept, 2)
            os.close(kept)
