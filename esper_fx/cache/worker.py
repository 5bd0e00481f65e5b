"""A worker process of the kernel compiler: runs jobs that come down a pipe, and dies with its parent.

It is started by its path and imports the standard library only, so that it is up in milliseconds: esper_fx, and torch
with it, comes in when a job's target imports it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import queue
import select
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

_HEADER = struct.Struct(">Q")
_CHUNK = 1 << 20
# How often a worker looks whether its parent still lives, should something else hold the parent's end of the pipe open.
_PARENT_POLL_MS = 1000
# While all processors are taken, a worker runs for so many seconds and then stands still for so many; see _pace.
_RHYTHMS = {b"u": (0.004, 0.007), b"b": (0.004, 0.016)}
_URGENT, _BACKGROUND, _REST = b"u", b"b", b"r"
#: A message that is no job: somebody waits for a job behind the one that runs.
HURRY = "hurry"


def pack(message: object) -> bytes:
    """Frames a message: its length, 8 bytes big-endian, and its pickle."""
    data = pickle.dumps(message, protocol=5)
    return _HEADER.pack(len(data)) + data


def receive(read: Callable[[int], bytes]) -> Any:
    """Reads one framed message.

    Args:
        read: Returns between one and as many bytes as asked for, or none at the end of the stream.

    Raises:
        EOFError: The stream ended.
    """
    (length,) = _HEADER.unpack(_read_exactly(read, _HEADER.size))
    return pickle.loads(_read_exactly(read, length))


def _read_exactly(read: Callable[[int], bytes], count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        chunk = read(min(_CHUNK, count - len(data)))
        if not chunk:
            raise EOFError("the stream ended")
        data += chunk
    return bytes(data)


def _serve(request_fd: int, reply_fd: int, nice: int) -> None:
    for descriptor in (request_fd, reply_fd):
        os.set_inheritable(descriptor, False)  # or a child of a job would hold the pipe open after this process died
    pacer_fd = _start_pacer(request_fd, reply_fd) if nice else None  # with 0 there is no training loop to be kind to
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    parent = os.getppid()
    threading.Thread(
        target=_read_requests, args=(request_fd, parent, requests, pacer_fd), name="requests", daemon=True
    ).start()

    os.nice(nice)
    _lower_session(nice)
    search_path, warm, urgent = requests.get()
    target, payload = warm, b""
    while True:
        _tell(pacer_fd, _URGENT if urgent else _BACKGROUND)
        reply = ("done", b"", 0.0, 0.0) if target is None else _run(target, payload, search_path)
        _tell(pacer_fd, _REST)
        _send(reply_fd, reply)
        target, payload, search_path, urgent = requests.get()


def _start_pacer(*held: int) -> int | None:
    """Forks the process that paces this one's jobs; returns the pipe that tells it of them, None where there is none.

    Args:
        held: Descriptors that the pacer must not keep open.
    """
    if not sys.platform.startswith("linux") or os.getpgrp() != os.getpid():
        return None
    read_fd, write_fd = os.pipe()
    if os.fork():
        os.close(read_fd)
        return write_fd
    try:
        for descriptor in (*held, write_fd):
            os.close(descriptor)
        os.setsid()  # what stops the worker must not stop its pacer, nor its low priority delay it
        _pace(os.getppid(), read_fd)
    finally:
        os._exit(0)


def _pace(group: int, jobs_fd: int) -> None:
    """Lets a process group stand still between short runs, while there are more runnable threads than processors.

    A low priority alone keeps a worker's *share* small, not its harm. The threads of a training step wait for each
    other; where Linux puts two of them on one processor and the worker on the other, a step takes twice its time, and
    that lasts, as each processor is busy. A processor that falls idle takes a waiting thread over at once, so every
    pause puts the training threads back on a processor each, and between pauses there is no time to lose much.

    Args:
        group: The process group to pace; its leader is this process's parent.
        jobs_fd: Brings a byte when a job begins and when it ends. Its end is the end of the pacer.
    """
    processors = len(os.sched_getaffinity(0))
    poll = select.poll()
    poll.register(jobs_fd, select.POLLIN)
    rhythm = None
    while True:
        if poll.poll(rhythm and rhythm[0] * 1e3):
            news = os.read(jobs_fd, 64)
            if not news:
                return
            rhythm = _RHYTHMS.get(news[-1:])
        elif rhythm and _runnable() > processors:
            os.killpg(group, signal.SIGSTOP)
            try:
                time.sleep(rhythm[1])
            finally:
                os.killpg(group, signal.SIGCONT)


def _runnable() -> int:
    """Threads that run or wait for a processor, on the whole machine, this one not counted; 0 where Linux hides it."""
    try:
        with open("/proc/loadavg", "rb") as load:
            return int(load.read().split()[3].partition(b"/")[0]) - 1
    except (OSError, ValueError, IndexError):
        return 0


def _tell(pacer_fd: int | None, news: bytes) -> None:
    if pacer_fd is not None:
        with contextlib.suppress(OSError):  # the pacer is gone: nobody to tell
            os.write(pacer_fd, news)


def _lower_session(nice: int) -> None:
    """Make the niceness count against other sessions.

    Linux with autogroups (sched(7)) shares the processors out between sessions first, and compares niceness only within
    one. A worker has a session of its own, so without this it would take half of a busy training loop's processors.
    """
    try:
        with open("/proc/self/autogroup", "w") as group:
            group.write(str(nice))
    except OSError:  # another system, or a kernel without autogroups: niceness counts as it is
        return


def _read_requests(request_fd: int, parent: int, requests: queue.SimpleQueue[Any], pacer_fd: int | None) -> None:
    """Passes requests on to the main thread; the end of the stream is the end of the parent, and so of this process."""
    poll = select.poll()
    poll.register(request_fd, select.POLLIN)

    def read(count: int) -> bytes:
        while not poll.poll(_PARENT_POLL_MS):
            if os.getppid() != parent:
                return b""
        return os.read(request_fd, count)

    try:
        while True:
            message = receive(read)
            if message == HURRY:
                _tell(pacer_fd, _URGENT)
            else:
                requests.put(message)
    except BaseException:  # whatever it is, no request can come any more
        _die()


def _die() -> None:
    """Ends this process and what its jobs started (C++ compilers)."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _send(reply_fd: int, message: object) -> None:
    view = memoryview(pack(message))
    try:
        while view:
            view = view[os.write(reply_fd, view) :]
    except OSError:  # the parent is gone
        _die()


def _run(target: str, payload: bytes, search_path: list[str]) -> tuple[Any, ...]:
    """Runs a job: ("done", data, seconds, cpu seconds) or ("error", type and message, traceback)."""
    sys.path[:] = search_path
    started, cpu_started = time.perf_counter(), _cpu_seconds()
    try:
        module, _, name = target.partition(":")
        data = getattr(importlib.import_module(module), name)(payload)
        if not isinstance(data, bytes):
            raise TypeError(f"job {target} returned a {type(data).__name__}, expected bytes")
        return "done", data, time.perf_counter() - started, _cpu_seconds() - cpu_started
    except BaseException as error:  # SystemExit too: a job does not end its worker by raising
        return "error", "".join(traceback.format_exception_only(error)).strip(), traceback.format_exc()
    finally:
        _flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # a job closed or replaced it
            continue


def _cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
