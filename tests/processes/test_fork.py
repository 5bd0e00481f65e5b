"""The engine in a forked child: its thread stayed in the parent, and so did whoever held a lock at the fork."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from esper_fx._torch import inductor
from esper_fx.cache._background import ForkSafeLock
from esper_fx.conductor import Conductor
from esper_fx.engine import region
from esper_fx.engine.service import Service
from tests.support.processes import in_forked_child

service_module, settings_module = (
    importlib.import_module(f"esper_fx.{name}") for name in ("engine.service", "settings")
)


class Workload:
    """Counts the rounds of work; while ``waiting`` is not empty there is something left to do."""

    def __init__(self, *waiting: Future[Any]) -> None:
        self.rounds = 0
        self.waiting = list(waiting)

    def work(self) -> list[Future[Any]]:
        self.rounds += 1
        return self.waiting


@pytest.fixture
def service() -> Service:
    """A service whose thread is up."""
    service = Service(None, None, None)  # type: ignore[arg-type]
    assert service.run(answer()).result(10) == 42
    return service


async def answer() -> int:
    return 42


def holding(lock: ForkSafeLock, check: Callable[[], object]) -> bool:
    """What ``check`` says while another thread holds the lock."""
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            release.wait(timeout=20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        return bool(check())
    finally:
        release.set()
        thread.join()


def test_a_service_has_a_thread_of_its_own_in_the_child_and_keeps_that_of_the_parent(service: Service) -> None:
    def check() -> None:
        assert service.run(answer()).result(5) == 42

    assert holding(service._lock, lambda: in_forked_child(check))
    assert service.run(answer()).result(10) == 42


def test_a_conductor_that_rests_works_in_the_child_when_it_is_kicked(service: Service) -> None:
    workload = Workload()
    conductor = Conductor(workload)
    conductor.kick(service)
    assert conductor.wait(10)
    rounds = workload.rounds

    def check() -> None:
        assert not conductor.busy
        conductor.kick(service)
        assert conductor.wait(5)
        assert workload.rounds == rounds + 1

    assert holding(conductor._lock, lambda: in_forked_child(check))
    assert workload.rounds == rounds
    conductor.kick(service)
    assert conductor.wait(10)


def test_what_a_conductor_was_at_goes_on_in_the_child_when_somebody_waits_for_it(service: Service) -> None:
    coming: Future[None] = Future()
    workload = Workload(coming)
    conductor = Conductor(workload)
    conductor.kick(service)
    assert not conductor.wait(0.05)

    def check() -> None:
        assert conductor.busy
        workload.waiting = []
        assert conductor.wait(5)

    assert in_forked_child(check)
    assert conductor.busy
    workload.waiting = []
    coming.set_result(None)
    assert conductor.wait(10)


@pytest.mark.parametrize(
    "lock",
    [inductor._GRAPH_LOCK, region._templates_lock, service_module._services_lock, settings_module._lock],
    ids=["graph", "templates", "services", "settings"],
)
def test_the_locks_of_modules_are_free_in_the_child(lock: ForkSafeLock) -> None:
    def check() -> None:
        with lock, lock:
            pass

    assert holding(lock, lambda: in_forked_child(check))


def test_a_lock_stays_with_the_thread_that_forked() -> None:
    lock = ForkSafeLock()

    def check() -> None:
        with lock:  # a second time
            pass
        assert not in_another_thread(lock)

    with lock:
        assert in_forked_child(check)
        assert not in_another_thread(lock)
    assert in_another_thread(lock)


def in_another_thread(lock: ForkSafeLock) -> bool:
    """Whether another thread gets the lock at once."""
    got = []
    thread = threading.Thread(target=lambda: got.append(lock._lock.acquire(blocking=False)))
    thread.start()
    thread.join()
    if got == [True]:
        lock._lock = threading.RLock()  # that of the thread, which has ended, is never let go of
    return got == [True]
