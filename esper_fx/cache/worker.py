"""A worker process of the kernel compiler: runs jobs that come down a pipe, and dies with its parent.

It is started by its path and imports the standard library only, so that it is up in milliseconds: esper_fx, and torch
with it, comes in when a job's target imports it.
"""

from __future__ import annotations

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


def _serve(request_fd: int, reply_fd: int) -> None:
    for descriptor in (request_fd, reply_fd):
        os.set_inheritable(descriptor, False)  # or a child of a job would hold the pipe open after this process died
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    parent = os.getppid()
    threading.Thread(target=_read_requests, args=(request_fd, parent, requests), name="requests", daemon=True).start()

    nice, search_path, warm = requests.get()
    os.nice(nice)
    _lower_session(nice)
    _send(reply_fd, _run(warm, b"", search_path) if warm is not None else ("done", b"", 0.0, 0.0))
    while True:
        target, payload, search_path = requests.get()
        _send(reply_fd, _run(target, payload, search_path))


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


def _read_requests(request_fd: int, parent: int, requests: queue.SimpleQueue[Any]) -> None:
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
            requests.put(receive(read))
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
    _serve(int(sys.argv[1]), int(sys.argv[2]))
