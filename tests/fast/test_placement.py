"""Where threads run beside a working compiler: native threads that keep all processors busy get one each."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from esper_fx.cache import _placement
from esper_fx.cache._placement import Placement
from tests.support.processes import eventually

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are placed on Linux only")


@pytest.fixture
def worker() -> Iterator[int]:
    """A process that stands for a worker, with a child of its own."""
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    assert eventually(lambda: len(children(process.pid)) == 1)
    yield process.pid
    os.killpg(process.pid, 9)
    process.wait()


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


class Clock:
    """Threads and processors as a test wants them: two processors, and how long each thread has run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, native: int) -> None:
        self.python = threading.get_native_id()
        self.native = native
        self.now = 100.0
        self.ran = {self.python: 0.0, native: 0.0}
        self.places: dict[int, set[int]] = {}
        monkeypatch.setattr(_placement.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(_placement, "_processor_seconds", lambda: dict(self.ran))
        monkeypatch.setattr(_placement, "_processors", lambda thread: sorted(self.places.get(thread, {0, 1})))
        monkeypatch.setattr(_placement.os, "sched_setaffinity", self.places.__setitem__)

    def pass_by(self, python: float, native: float, seconds: float = 1.0) -> None:
        """Time in which the two threads run for these shares of it."""
        self.now += seconds
        ran = {self.python: python * seconds, self.native: native * seconds}
        self.ran = {thread: self.ran[thread] + more for thread, more in ran.items()}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch, native=999_999_999)


def test_a_busy_native_thread_and_the_worker_share_the_last_processor_until_the_work_ends(
    clock: Clock, worker: int
) -> None:
    placement = Placement()
    with placement.beside(worker):
        clock.pass_by(python=0.9, native=0.9)
        placement.look()
        (child,) = children(worker)
        assert clock.places == {clock.native: {1}, worker: {1}, child: {1}}
        clock.pass_by(python=0.9, native=0.5)  # it shares its processor now
        placement.look()
        assert clock.places[clock.native] == {1}
    assert clock.places == {clock.native: {0, 1}, worker: {0, 1}, child: {0, 1}}


@pytest.mark.parametrize(("python", "native"), [(0.9, 0.1), (0.1, 0.9), (0.0, 0.0)])
def test_nothing_is_placed_while_a_processor_is_free(clock: Clock, worker: int, python: float, native: float) -> None:
    placement = Placement()
    with placement.beside(worker):
        for _ in range(3):
            clock.pass_by(python, native)
            placement.look()
        assert clock.places == {}


def test_places_are_given_back_when_training_stops(clock: Clock, worker: int) -> None:
    placement = Placement()
    with placement.beside(worker):
        clock.pass_by(python=0.9, native=0.9)
        placement.look()
        clock.pass_by(python=0.0, native=0.0)
        placement.look()
        assert clock.places[clock.native] == clock.places[worker] == {0, 1}


def test_a_short_pause_changes_nothing(clock: Clock, worker: int) -> None:
    placement = Placement()
    with placement.beside(worker):
        clock.pass_by(python=0.9, native=0.9)
        placement.look()
        clock.pass_by(python=0.0, native=0.0, seconds=0.9)
        placement.look()
        assert clock.places[clock.native] == clock.places[worker] == {1}


def test_a_job_begins_with_the_places_of_the_one_before_it(clock: Clock, worker: int) -> None:
    placement = Placement()
    with placement.beside(worker):
        clock.pass_by(python=0.9, native=0.9)
        placement.look()
    assert clock.places[clock.native] == clock.places[worker] == {0, 1}
    clock.pass_by(python=0.9, native=0.9, seconds=0.5)
    with placement.beside(worker):
        assert clock.places[clock.native] == clock.places[worker] == {1}
    clock.pass_by(python=0.9, native=0.9)
    with placement.beside(worker):
        assert clock.places[clock.native] == clock.places[worker] == {0, 1}


def test_a_worker_that_joins_another_is_placed_at_once(clock: Clock, worker: int) -> None:
    placement = Placement()
    with placement.beside(worker):
        clock.pass_by(python=0.9, native=0.9)
        placement.look()
        (child,) = children(worker)
        with placement.beside(child):
            assert clock.places[child] == {1}
        assert clock.places[clock.native] == clock.places[worker] == {1}


def test_a_thread_that_somebody_else_has_placed_is_left_alone(clock: Clock, worker: int) -> None:
    clock.places[clock.native] = {0}
    placement = Placement()
    with placement.beside(worker):
        clock.pass_by(python=0.9, native=0.9)
        placement.look()
    assert clock.places[clock.native] == {0}


def test_without_a_worker_nobody_is_looked_at(clock: Clock) -> None:
    placement = Placement()
    placement.look()
    clock.pass_by(python=0.9, native=0.9)
    placement.look()
    assert clock.places == {}


def test_the_time_that_real_threads_have_run_is_known() -> None:
    before = _placement._processor_seconds()
    for _ in range(100):
        torch.randn(200, 200) @ torch.randn(200, 200)
    after = _placement._processor_seconds()
    mine = threading.get_native_id()
    assert after[mine] > before[mine]
    assert all(after[thread] >= before[thread] for thread in before if thread in after)


def test_a_real_process_is_placed_with_its_children_and_threads(worker: int) -> None:
    (child,) = children(worker)
    processor = min(os.sched_getaffinity(0))
    _placement._place_process(worker, {processor})
    assert os.sched_getaffinity(worker) == os.sched_getaffinity(child) == {processor}
