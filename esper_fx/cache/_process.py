"""The parent's handle of one worker process: its pipes, its log and its end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper_fx.cache import worker
from esper_fx.cache._background import register_after_fork
from esper_fx.cache._placement import placement

_LOG_TAIL_BYTES = 2000


class WorkerDiedError(Exception):
    """The worker ended without a reply; the message names its exit status and ends with the last of its output."""


class WorkerTimeoutError(Exception):
    """The worker did not reply in time."""


class WorkerProcess:
    """A running worker. One thread at a time calls it; any thread may ``kill`` it.

    The worker has a session of its own, so that Ctrl-C in a terminal does not reach it and so that it can be killed
    together with what its jobs start. What it prints goes to an unlinked temporary file.

    Args:
        nice: What is added to the worker's niceness; with 0 it is not paced either.
        environment: Its environment variables, complete.
        warm: Target that the worker runs once, with ``b""``, before its first job.
        urgent: Whether somebody waits for that.

    Raises:
        OSError: The process could not be started.
    """

    def __init__(self, *, nice: int, environment: Mapping[str, str], warm: str | None, urgent: bool) -> None:
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._closed = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        child_read, self._write_fd = os.pipe()
        self._read_fd, child_write = os.pipe()
        register_after_fork(self)
        try:
            self._process = subprocess.Popen(
                # -P: the folder of the script is not for importing from, not even before sys.path is set.
                [sys.executable, "-P", str(Path(worker.__file__)), *map(str, (child_read, child_write, nice))],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=dict(environment),
                pass_fds=(child_read, child_write),
                start_new_session=True,
            )
        except BaseException:
            self._close_files()
            raise
        finally:
            os.close(child_read)
            os.close(child_write)
        os.set_blocking(self._write_fd, False)
        self._greeting = (_search_path(), warm, urgent)

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return not self._closed and self._process.poll() is None

    def wait_until_ready(self, timeout: float | None) -> tuple[Any, ...]:
        """Lets the worker run ``warm`` and returns its reply to that; errors as in ``call``. Comes before any call."""
        return self._exchange(self._greeting, timeout)

    def call(self, target: str, payload: bytes, timeout: float | None, *, urgent: bool) -> tuple[Any, ...]:
        """Runs a job and returns the worker's reply, as ``worker._run`` describes it; ``urgent`` as ``Job`` has it.

        Raises:
            WorkerDiedError: The process ended first.
            WorkerTimeoutError: ``timeout`` seconds passed. The worker is still busy: close it.
        """
        self._log.seek(0)  # parent and child share one file offset
        self._log.truncate()
        return self._exchange((target, payload, _search_path(), urgent), timeout)

    def hurry(self) -> None:
        """Lets the job that runs have the pace of an urgent one: an urgent one waits behind it. Returns at once."""
        with self._lock, self._writing:
            if not self._closed:
                with contextlib.suppress(OSError):  # it is about to end, or has requests enough
                    os.write(self._write_fd, worker.pack(worker.HURRY))

    def output(self) -> str:
        """The last of what the worker has printed since its latest job began."""
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), _LOG_TAIL_BYTES, max(0, size - _LOG_TAIL_BYTES))
        return tail.decode(errors="replace").strip()

    def kill(self) -> None:
        """Kills the worker and its children; whoever waits for a reply gets WorkerDiedError."""
        with self._lock:
            if not self._closed:
                self._kill_group()

    def close(self) -> None:
        """Kills the worker and its children, and releases everything."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._kill_group()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
            self._close_files()

    def after_fork_in_child(self) -> None:
        """Lets go of the pipes: a forked child that held them would keep the worker alive after its parent's death."""
        self._lock, self._writing = threading.Lock(), threading.Lock()
        if not self._closed:
            self._closed = True
            self._close_files()
            if hasattr(self, "_process"):
                self._process.returncode = 0  # not this process's child: nothing to wait for

    def _kill_group(self) -> None:
        # The group outlives its leader as long as a member does, so this reaches the children of a dead worker too.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _close_files(self) -> None:
        os.close(self._write_fd)
        os.close(self._read_fd)
        self._log.close()

    def _exchange(self, message: object, timeout: float | None) -> tuple[Any, ...]:
        deadline = None if timeout is None else time.monotonic() + timeout

        def read(count: int) -> bytes:
            self._wait(self._read_fd, select.POLLIN, deadline)
            return os.read(self._read_fd, count)

        with placement.beside(self._process.pid):
            self._send(worker.pack(message), deadline)
            try:
                reply: tuple[Any, ...] = worker.receive(read)
            except EOFError:
                raise self._died() from None
        return reply

    def _send(self, message: bytes, deadline: float | None) -> None:
        view = memoryview(message)
        with self._writing:
            while view:
                self._wait(self._write_fd, select.POLLOUT, deadline)
                try:
                    view = view[os.write(self._write_fd, view) :]
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    raise self._died() from None

    def _wait(self, descriptor: int, event: int, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        look_s = placement.look()
        while True:
            remaining = look_s if deadline is None else min(look_s, deadline - time.monotonic())
            if poll.poll(max(0.0, remaining) * 1e3):
                return
            look_s = placement.look()
            # Should a child of the worker hold its pipe open, the end of the worker does not show there.
            if self._process.poll() is not None:
                raise self._died()
            if remaining <= 0:
                raise WorkerTimeoutError

    def _died(self) -> WorkerDiedError:
        self._kill_group()
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return WorkerDiedError("it closed its pipe but does not end")
        how = f"exit status {status}"
        if status < 0:
            with contextlib.suppress(ValueError):
                how = f"exit status {status} ({signal.Signals(-status).name})"
        if status == -signal.SIGKILL:
            how += ", perhaps because memory ran out"
        output = self.output()
        return WorkerDiedError(f"{how}; its last output:\n{output}" if output else how)


def _search_path() -> list[str]:
    """The parent's sys.path: the worker shall import the same modules, from whatever folder."""
    entries = [entry for entry in sys.path if isinstance(entry, str)]
    # Entries that are not files are names that import hooks know; they stay as they are.
    return [os.path.abspath(entry) if not entry or os.path.exists(entry) else entry for entry in entries]
