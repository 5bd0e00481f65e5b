"""The pacer of a compile worker: it pauses the worker while processors are short, and neither outlives the other."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from esper_fx.cache import Job, KernelCompiler, worker
from esper_fx.cache._process import WorkerProcess
from tests.support.processes import eventually, is_running

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are paced on Linux only")
JOBS = "tests.support.cache_jobs"


def state(pid: int) -> str:
    """R, S, T, … as ps has it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def seen(pid: int, wanted: str, seconds: float) -> bool:
    """Whether a process is in a state at some moment of so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if state(pid) == wanted:
            return True
        time.sleep(0.0005)
    return False


@pytest.fixture
def busy() -> Iterator[int]:
    """A process that leads a group and works."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    yield process.pid
    process.kill()
    process.wait()


@pytest.fixture
def pacer(busy: int) -> Iterator[int]:
    """The pipe to a pacer of the busy process, in this one."""
    read_fd, write_fd = os.pipe()
    thread = threading.Thread(target=worker._pace, args=(busy, read_fd))
    thread.start()
    yield write_fd
    os.close(write_fd)
    thread.join(timeout=10)
    os.close(read_fd)
    assert not thread.is_alive()
    assert state(busy) != "T"


@pytest.mark.parametrize("news", [b"u", b"b"])
def test_a_job_has_pauses_while_processors_are_short(
    busy: int, pacer: int, news: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_runnable", lambda: 10_000)
    assert not seen(busy, "T", 0.1)  # no job yet
    os.write(pacer, news)
    assert seen(busy, "T", 10)
    assert seen(busy, "R", 10)
    os.write(pacer, b"r")
    assert eventually(lambda: not seen(busy, "T", 0.1))  # a pause may have been about to begin


def test_a_job_has_none_while_processors_are_free(busy: int, pacer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_runnable", lambda: 1)
    os.write(pacer, b"u")
    assert not seen(busy, "T", 0.2)


def test_runnable_threads_are_counted(busy: int) -> None:
    assert eventually(lambda: worker._runnable() >= 1)


def pids(compiler: KernelCompiler) -> tuple[int, int]:
    """The worker and its pacer."""
    worker_pid = json.loads(compiler.submit(Job(f"{JOBS}:describe", b"")).result(timeout=20).data)["pid"]
    (pacer_pid,) = map(int, Path(f"/proc/{worker_pid}/task/{worker_pid}/children").read_text().split())
    return worker_pid, pacer_pid


def test_the_pacer_ends_with_its_worker_however_that_ends() -> None:
    for kill in (False, True):
        with KernelCompiler(nice=1) as compiler:
            pid, pacer = pids(compiler)
            assert is_running(pacer)
            if kill:
                os.kill(pid, signal.SIGKILL)
        assert eventually(lambda pacer=pacer: not is_running(pacer))  # type: ignore[misc]


def test_a_worker_that_is_not_to_be_nice_has_no_pacer() -> None:
    with KernelCompiler(nice=0) as compiler:
        worker_pid = json.loads(compiler.submit(Job(f"{JOBS}:describe", b"")).result(timeout=20).data)["pid"]
        assert not Path(f"/proc/{worker_pid}/task/{worker_pid}/children").read_text().split()


def test_a_worker_works_on_without_its_pacer() -> None:
    with KernelCompiler(nice=1) as compiler:
        _, pacer = pids(compiler)
        os.kill(pacer, signal.SIGKILL)
        assert compiler.submit(Job(f"{JOBS}:echo", b"x")).result(timeout=20).data == b"x"


def test_a_job_has_an_urgent_pace_as_soon_as_an_urgent_one_waits_behind_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hurried: list[WorkerProcess] = []
    monkeypatch.setattr(WorkerProcess, "hurry", lambda process: hurried.append(process))  # noqa: PLW0108 (a method)
    with KernelCompiler(nice=1) as compiler:
        first = compiler.submit(Job(f"{JOBS}:wait_for_file", str(tmp_path / "go").encode(), priority=10))
        assert eventually(lambda: compiler.stats().running == 1)
        assert not hurried
        compiler.submit(Job(f"{JOBS}:echo", b"x", priority=10))
        assert not hurried
        second = compiler.submit(Job(f"{JOBS}:echo", b"x"))
        assert len(hurried) == 1
        (tmp_path / "go").touch()
        first.result(timeout=20), second.result(timeout=20)


def test_hurrying_changes_the_pace_and_is_no_job() -> None:
    read_fd, write_fd = os.pipe()
    pace_read, pace_write = os.pipe()
    requests: queue.SimpleQueue[object] = queue.SimpleQueue()
    arguments = (read_fd, os.getppid(), requests, pace_write)
    reader = threading.Thread(target=_reading, args=arguments)
    reader.start()
    os.write(write_fd, worker.pack(worker.HURRY) + worker.pack("a job"))
    assert requests.get(timeout=10) == "a job"
    assert os.read(pace_read, 16) == b"u"
    os.close(write_fd)
    reader.join(timeout=10)
    for descriptor in (read_fd, pace_read, pace_write):
        os.close(descriptor)


def _reading(*arguments: Any) -> None:
    """The worker's reader, whose end is not this process's."""
    with mock.patch.object(worker, "_die"):
        worker._read_requests(*arguments)
