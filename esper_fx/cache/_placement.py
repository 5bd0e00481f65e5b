"""Where threads run while a worker compiles beside a training step that uses every processor."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator

from esper_fx.cache._background import register_after_fork, yielding

# Seconds between two looks at who is busy, and from the beginning of a job to the first of them.
_LOOK_S, _FIRST_LOOK_S = 0.15, 0.05
# Threads keep their places so long after they were last seen to keep all processors busy: a look may fall on a pause.
_PATIENCE_S = 1.0
# A thread is busy if it has used this share of a processor since the last look.
_BUSY = 0.2


class Placement:
    """Keeps the threads of a training step on a processor each while workers run beside it.

    The threads of a step (OpenMP's) wait for each other. With a worker beside them Linux now and then puts two of them
    on one processor for a while, and steps take two to three times as long. So while there is a worker at work, and the
    numeric library's own threads and a Python thread keep all processors busy, each of the former gets a processor to
    itself and the worker shares the last one. The Python thread is left alone: threads and processes that it starts
    would inherit its place. Threads that somebody else has placed are left alone too. A job that follows another one
    begins with the places of that. Does nothing where there is no Linux.
    """

    def __init__(self) -> None:
        self._reset()
        register_after_fork(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._workers: list[int] = []
        self._seen: dict[int, float] = {}
        self._seen_at = 0.0
        self._placed: list[int] = []
        self._contested_at = -math.inf
        self._former: list[int] = []

    @contextlib.contextmanager
    def beside(self, worker: int) -> Iterator[None]:
        """Inside, a worker process (its pid) is at work; call ``look`` every now and then."""
        with self._lock, contextlib.suppress(OSError):
            self._workers.append(worker)
            now = time.monotonic()
            if not self._placed:
                self._seen, self._seen_at = _processor_seconds(), now
                if now < self._contested_at + _PATIENCE_S:
                    self._place([t for t in self._former if t in self._seen])
            else:
                self._place_workers()
        try:
            yield
        finally:
            with self._lock:
                self._release([worker])
                self._workers.remove(worker)
                if not self._workers:
                    self._release_threads()

    def look(self) -> float:
        """See who is busy, and place threads and workers accordingly. Takes less than a millisecond.

        Returns:
            Seconds after which to look again.
        """
        with self._lock, yielding, contextlib.suppress(OSError):
            processors = _processors(os.getpid())
            now, times = time.monotonic(), _processor_seconds()
            elapsed = now - self._seen_at
            if elapsed < _FIRST_LOOK_S / 2 or not self._workers or len(processors) < 2:
                return _FIRST_LOOK_S
            busy = [t for t in times if t in self._seen and times[t] - self._seen[t] >= _BUSY * elapsed]
            self._seen, self._seen_at = times, now
            python = {thread.native_id for thread in threading.enumerate()}
            native = [t for t in busy if t not in python]
            contested = len(native) == len(processors) - 1 < len(busy)
            if contested and native == self._placed:
                self._contested_at = now
            elif self._placed and (set(native) - set(self._placed) or now >= self._contested_at + _PATIENCE_S):
                self._release(self._workers)
                self._release_threads()
            elif contested and not self._placed:
                self._contested_at = now
                self._place(native)
        return _LOOK_S

    def after_fork_in_child(self) -> None:
        """Forgets the threads, which stayed in the parent."""
        self._reset()

    def _place(self, native: list[int]) -> None:
        processors = _processors(os.getpid())
        if len(native) == len(processors) - 1 > 0 and all(_processors(t) == processors for t in native):
            for thread, processor in zip(native, processors[1:], strict=True):
                os.sched_setaffinity(thread, {processor})
            self._placed = self._former = native
            self._place_workers()

    def _place_workers(self) -> None:
        processors = _processors(os.getpid())
        for number, worker in enumerate(self._workers):
            _place_process(worker, {processors[-1 - number % (len(processors) - 1)]})

    def _release_threads(self) -> None:
        for thread in self._placed:
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setaffinity(thread, set(_processors(os.getpid())))
        self._placed = []

    def _release(self, workers: list[int]) -> None:
        if self._placed:
            for worker in workers:
                with contextlib.suppress(OSError):
                    _place_process(worker, set(_processors(os.getpid())))


placement = Placement()


def _processors(thread: int) -> list[int]:
    return sorted(os.sched_getaffinity(thread)) if hasattr(os, "sched_getaffinity") else []


def _processor_seconds() -> dict[int, float]:
    """For each thread of this process, by its number in the system, the seconds it has run; empty where not told."""
    seconds = {}
    for name in sorted(os.listdir("/proc/self/task"), key=int):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{name}/schedstat", "rb") as file:
            seconds[int(name)] = int(file.read().split()[0]) / 1e9
    return seconds


def _place_process(pid: int, processors: set[int]) -> None:
    """Sets the processors of all threads of a process and of what it has started."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(int(thread), processors)
            with open(f"/proc/{pid}/task/{thread}/children") as children:
                for child in children.read().split():
                    _place_process(int(child), processors)
