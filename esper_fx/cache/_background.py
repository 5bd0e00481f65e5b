"""What background threads share: a pool of daemon threads, and what a forked child must forget."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol

logger = logging.getLogger(__name__)

Task = Callable[[], None]

# Longest wait at interpreter exit for tasks that have begun: a thread that is frozen inside native code while the
# process tears down can crash it, and a stuck one must not keep it alive.
_EXIT_GRACE_S = 1.0


class ForkAware(Protocol):
    """An object with threads, locks or descriptors that a forked child must not use."""

    def after_fork_in_child(self) -> None:
        """Forgets them. Runs in the child's only thread, before anything else."""


_fork_aware: weakref.WeakSet[ForkAware] = weakref.WeakSet()


def register_after_fork(item: ForkAware) -> None:
    """Has ``item.after_fork_in_child()`` called in every forked child, for as long as ``item`` lives."""
    _fork_aware.add(item)


def _after_fork_in_child() -> None:
    for item in list(_fork_aware):
        item.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class ForkSafeLock:
    """A reentrant lock that a forked child finds free if a thread held it that stayed in the parent."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        register_after_fork(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[bool]:
        """Holds the lock if it can be had within ``seconds``, and yields whether it is held."""
        lock = self._lock
        held = lock.acquire(timeout=seconds)
        try:
            yield held
        finally:
            if held:
                lock.release()

    def after_fork_in_child(self) -> None:
        """Keeps the lock if it is free or held by the thread that forked, which still has to let go of it."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock = threading.RLock()


class _Yielding:
    """While entered by any thread, Python threads take turns more often.

    A thread that has let go of the interpreter lock, as every PyTorch operator does, gets it back from a thread that
    runs Python code only after a switch interval, 5 ms by default: background work in Python would cost a training step
    that much at every operator. The interval is the whole process's, so it is lowered for the time of the work only.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval = interval_s
        self._reset()
        register_after_fork(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._entered = 0
        self._before = sys.getswitchinterval()

    def __enter__(self) -> None:
        with self._lock:
            if not self._entered:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(min(self._before, self._interval))
            self._entered += 1

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._entered -= 1
            if not self._entered:
                sys.setswitchinterval(self._before)

    def after_fork_in_child(self) -> None:
        """Restores the interval: the threads that worked stayed in the parent."""
        if self._entered:
            sys.setswitchinterval(self._before)
        self._reset()


yielding = _Yielding(0.0003)


class DaemonPool:
    """A few daemon threads that run tasks first in, first out.

    Unlike ``ThreadPoolExecutor`` it never holds up the exit of the process for what has not begun. Threads start when
    the first tasks come and end when the pool is closed or collected.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._limit = threads
        self._name = name
        self._reset()
        register_after_fork(self)
        _pools.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        # The threads know the queue only, so that an abandoned pool is collected and its threads end.
        weakref.finalize(self, self._tasks.put, None).atexit = False

    def submit(self, task: Task) -> None:
        """Queues a task. What it raises is logged, not raised."""
        self._tasks.put(task)
        if len(self._threads) < self._limit:
            with self._lock:
                if (number := len(self._threads)) < self._limit:
                    name = f"{self._name}-{number}"
                    thread = threading.Thread(target=_run_tasks, args=(self._tasks,), name=name, daemon=True)
                    try:
                        thread.start()
                    except RuntimeError:  # the interpreter is shutting down, or the system is out of threads
                        if not self._threads:
                            raise
                    else:
                        self._threads.append(thread)

    def close(self, timeout: float) -> None:
        """Drops what has not begun and waits up to ``timeout`` seconds for what has."""
        while True:
            try:
                self._tasks.get_nowait()
            except queue.Empty:
                break
        self._tasks.put(None)
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def after_fork_in_child(self) -> None:
        """Starts afresh: the threads stayed in the parent."""
        self._reset()


_pools: weakref.WeakSet[DaemonPool] = weakref.WeakSet()


@atexit.register
def _close_pools() -> None:
    for pool in list(_pools):
        pool.close(_EXIT_GRACE_S)


def _run_tasks(tasks: queue.SimpleQueue[Task | None]) -> None:
    while (task := tasks.get()) is not None:
        try:
            with yielding:
                task()
        except Exception:
            logger.exception("a background task of the kernel cache failed")
        del task  # or an idle thread keeps alive what its last task referred to
    tasks.put(None)  # for the next thread
