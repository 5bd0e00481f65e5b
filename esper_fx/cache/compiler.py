"""The kernel compiler: a queue of jobs and the worker processes that run them."""

from __future__ import annotations

import atexit
import heapq
import itertools
import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from esper_fx.cache._background import register_after_fork
from esper_fx.cache._process import WorkerDiedError, WorkerProcess, WorkerTimeoutError
from esper_fx.cache.job import Job, JobResult, check_target
from esper_fx.checks import real, shown, whole
from esper_fx.errors import ArgumentError, KernelBuildError, SettingsError

logger = logging.getLogger(__name__)

_ATTEMPTS = 2
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class CompilerStats:
    """Counts of jobs and workers since the compiler was made; seconds are of completed jobs, in the workers."""

    pending: int
    running: int
    completed: int
    failed: int
    retried: int
    workers_started: int
    workers_ready: int
    seconds_total: float
    cpu_seconds_total: float


@dataclass(order=True)
class _Task:
    priority: int
    number: int
    job: Job = field(compare=False)
    future: Future[JobResult] = field(compare=False)


class KernelCompiler:
    """A pool of worker processes that compile kernels beside a training loop.

    Workers are processes of our own, not ``multiprocessing``'s, so that scripts need no ``__main__`` guard. They run
    at low priority, end with this process however it ends, and are replaced when they die. The threads of the pool
    only wait on pipes.

    Args:
        workers: Most processes at a time; each starts when there is a job that no other is free to take.
        nice: What is added to the niceness of the workers, 0 to 19. Above 0 they also stand still now and then while all
            processors are taken.
        threads: How many threads the numeric libraries in a worker may use (``OMP_NUM_THREADS`` and relatives).
        environment: Environment variables of the workers, on top of this process's.
        warm: Target run once, with ``b""``, when a worker starts; the place for slow imports.
        job_timeout: Seconds of wall-clock time after which a job is given up and its worker killed.

    Raises:
        SettingsError: An argument is out of range.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        nice: int = 4,
        threads: int = 1,
        environment: Mapping[str, str] = MappingProxyType({}),
        warm: str | None = None,
        job_timeout: float | None = 600.0,
    ) -> None:
        self._limit = _at_least_one("workers", workers)
        thread_count = _at_least_one("threads", threads)
        niceness = whole(nice)
        if niceness is None or not 0 <= niceness <= 19:
            raise SettingsError(
                f"nice={shown(nice)}: expected 0 to 19 (0 is this process's own priority), a whole number"
            )
        seconds = real(job_timeout)
        if job_timeout is not None and (seconds is None or not seconds > 0):
            raise SettingsError(f"job_timeout={shown(job_timeout)}: expected seconds above 0, or None for no limit")
        if warm is not None:
            check_target(warm)
        texts = isinstance(environment, Mapping) and all(
            isinstance(t, str) for each in environment.items() for t in each
        )
        if not texts:
            raise SettingsError(
                f"environment={shown(environment)}: expected a dict of texts by name, such as {{'LANG': 'C'}}"
            )
        self._nice = niceness
        self._environment = dict.fromkeys(_THREAD_VARIABLES, str(thread_count)) | dict(environment)
        self._warm = warm
        self._job_timeout = seconds
        self._numbers = itertools.count()
        self._closed = False
        self._reset()
        register_after_fork(self)

    def _reset(self) -> None:
        self._condition = threading.Condition()
        self._tasks: list[_Task] = []
        self._threads: list[threading.Thread] = []
        self._processes: set[WorkerProcess] = set()
        self._ready: set[WorkerProcess] = set()
        self._free = 0  # threads that wait for a task, or are about to
        self._running = self._completed = self._failed = self._retried = self._started = 0
        self._seconds = self._cpu_seconds = 0.0

    def submit(self, job: Job) -> Future[JobResult]:
        """Queues a job and returns at once.

        ``Future.cancel()`` works until a worker takes the job. The future raises ``KernelBuildError`` when the job
        raised (``worker_traceback`` then has the worker's), ran out of time, or ended two workers.

        Raises:
            KernelBuildError: The compiler is closed.
            ArgumentError: It is no job.
        """
        if not isinstance(job, Job):
            raise ArgumentError(f"submit() needs a Job, such as Job('package.module:function', b''), not {shown(job)}")
        future: Future[JobResult] = Future()
        with self._condition:
            if self._closed:
                raise KernelBuildError(f"job {job.target} was submitted to a closed kernel compiler: make a new one")
            heapq.heappush(self._tasks, _Task(job.priority, next(self._numbers), job, future))
            if self._free < len(self._tasks):
                self._add_thread()
            self._condition.notify()
            behind = list(self._processes) if job.urgent and self._free < len(self._tasks) else []
        for process in behind:
            process.hurry()
        return future

    def start(self) -> None:
        """Starts all workers now, without waiting for them, so that the first job finds them warm."""
        with self._condition:
            while not self._closed and self._add_thread():
                pass

    def ready(self) -> bool:
        """Whether a worker is up and warm."""
        with self._condition:
            return any(worker.alive for worker in self._ready)

    def stats(self) -> CompilerStats:
        """A consistent snapshot of the counters."""
        with self._condition:
            return CompilerStats(
                pending=sum(not task.future.cancelled() for task in self._tasks),
                running=self._running,
                completed=self._completed,
                failed=self._failed,
                retried=self._retried,
                workers_started=self._started,
                workers_ready=len(self._ready),
                seconds_total=self._seconds,
                cpu_seconds_total=self._cpu_seconds,
            )

    def close(self) -> None:
        """Kills the workers and fails the jobs that are not done. Runs by itself when the interpreter exits."""
        with self._condition:
            self._closed = True
            tasks, self._tasks = self._tasks, []
            processes = list(self._processes)
            self._condition.notify_all()
        atexit.unregister(self.close)
        for process in processes:
            process.kill()
        for task in tasks:
            if task.future.set_running_or_notify_cancel():
                task.future.set_exception(KernelBuildError(_closed_message(task.job)))
        for thread in self._threads:
            if thread is not threading.current_thread():  # a future's callback may close the compiler
                thread.join(timeout=10)

    def __enter__(self) -> KernelCompiler:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def after_fork_in_child(self) -> None:
        """Starts afresh: workers, threads and jobs stayed in the parent. The child gets its own on demand."""
        self._reset()

    def _add_thread(self) -> bool:
        if len(self._threads) >= self._limit:
            return False
        if not self._threads:
            atexit.register(self.close)
        name = f"esper_fx-compiler-{len(self._threads)}"
        thread = threading.Thread(target=self._serve, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)
        self._free += 1
        return True

    def _serve(self) -> None:
        """A pool thread: keeps one worker and feeds it."""
        worker: WorkerProcess | None = None
        try:
            worker = self._start_worker()
        except Exception as error:  # the first job tries again, and reports what happens then
            if not self._closed:
                logger.warning("a worker of the kernel compiler did not start: %s", error)
        while (task := self._take()) is not None:
            worker, outcome = self._run(task.job, worker)
            self._settle(task, outcome)
            del task, outcome  # or an idle thread keeps them alive
        self._retire(worker)

    def _take(self) -> _Task | None:
        with self._condition:
            while True:
                while not self._tasks and not self._closed:
                    self._condition.wait()
                if self._closed:
                    return None
                task = heapq.heappop(self._tasks)
                if task.future.set_running_or_notify_cancel():
                    self._free -= 1
                    self._running += 1
                    return task

    def _settle(self, task: _Task, outcome: JobResult | KernelBuildError) -> None:
        with self._condition:
            self._free += 1
            self._running -= 1
            if isinstance(outcome, JobResult):
                self._completed += 1
                self._seconds += outcome.seconds
                self._cpu_seconds += outcome.cpu_seconds
            else:
                self._failed += 1
        if isinstance(outcome, JobResult):
            task.future.set_result(outcome)
        else:
            task.future.set_exception(outcome)

    def _run(self, job: Job, worker: WorkerProcess | None) -> tuple[WorkerProcess | None, JobResult | KernelBuildError]:
        """Runs a job on the worker or its replacement; returns the worker that is left, if any, and the outcome."""
        problem = ""
        for attempt in range(_ATTEMPTS):
            try:
                worker = self._living(worker)
                reply = worker.call(job.target, job.payload, self._job_timeout, urgent=job.urgent)
            except Exception as error:
                self._retire(worker)
                worker = None
                if self._closed:
                    return None, KernelBuildError(_closed_message(job))
                problem = _describe(error, self._job_timeout)
                if not isinstance(error, WorkerDiedError):
                    break
                logger.warning("job %s ended its worker (%d of %d): %s", job.target, attempt + 1, _ATTEMPTS, error)
                with self._condition:
                    self._retried += attempt + 1 < _ATTEMPTS
            else:
                return worker, _outcome(job, reply, worker)
        return None, KernelBuildError(f"job {job.target} {problem}")

    def _living(self, worker: WorkerProcess | None) -> WorkerProcess:
        if worker is not None and worker.alive:
            return worker
        self._retire(worker)  # it died between two jobs
        return self._start_worker()

    def _start_worker(self) -> WorkerProcess:
        with self._condition:
            urgent = any(task.job.urgent for task in self._tasks)
        environment = os.environ | self._environment
        worker = WorkerProcess(nice=self._nice, environment=environment, warm=self._warm, urgent=urgent)
        with self._condition:
            self._processes.add(worker)
            self._started += 1
            closed = self._closed
        if closed:  # close() did not see this one
            worker.kill()
        try:
            reply = worker.wait_until_ready(self._job_timeout)
        except BaseException:
            self._retire(worker)
            raise
        if reply[0] == "error":  # not fatal: a job that needs what is missing will say so
            logger.warning("%s failed in a new worker of the kernel compiler: %s", self._warm, reply[1])
        with self._condition:
            self._ready.add(worker)
        return worker

    def _retire(self, worker: WorkerProcess | None) -> None:
        if worker is not None:
            with self._condition:
                self._processes.discard(worker)
                self._ready.discard(worker)
            worker.close()


def _outcome(job: Job, reply: tuple[Any, ...], worker: WorkerProcess) -> JobResult | KernelBuildError:
    if output := worker.output():
        logger.debug("job %s printed:\n%s", job.target, output)
    if reply[0] == "done":
        return JobResult(*reply[1:])
    _, summary, trace = reply
    return KernelBuildError(f"job {job.target} failed in its worker: {summary}", worker_traceback=trace)


def _describe(error: Exception, job_timeout: float | None) -> str:
    if isinstance(error, WorkerDiedError):
        return f"ended {_ATTEMPTS} worker processes, the last with {error}"
    if isinstance(error, WorkerTimeoutError):
        return f"was not done after {job_timeout} s and its worker was killed: raise job_timeout"
    return f"could not be given to a worker process: {type(error).__name__}: {error}"


def _closed_message(job: Job) -> str:
    return f"the kernel compiler was closed before job {job.target} was done"


def _at_least_one(name: str, value: object) -> int:
    number = whole(value)
    if number is None or number < 1:
        raise SettingsError(f"{name}={shown(value)}: expected at least 1, a whole number")
    return number
