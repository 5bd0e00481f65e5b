"""Background threads of the cache: while they work, Python threads take turns more often."""

from __future__ import annotations

import sys
import threading

from esper_fx.cache._background import DaemonPool, yielding
from tests.support.processes import in_forked_child


def test_the_switch_interval_is_low_while_a_task_runs_and_as_before_after_the_last() -> None:
    before = sys.getswitchinterval()
    pool, seen, go, ready = DaemonPool(2, "test"), [], threading.Event(), threading.Barrier(3)

    def task() -> None:
        ready.wait()
        seen.append(sys.getswitchinterval())
        go.wait()

    for _ in range(2):
        pool.submit(task)
    ready.wait()
    go.set()
    pool.close(10)
    assert len(seen) == 2
    assert max(seen) < before
    assert sys.getswitchinterval() == before


def test_a_lower_interval_of_the_user_stays() -> None:
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-5)
        mine = sys.getswitchinterval()
        with yielding:
            assert sys.getswitchinterval() == mine
        assert sys.getswitchinterval() == mine
    finally:
        sys.setswitchinterval(before)


def test_a_child_forked_meanwhile_has_the_interval_from_before() -> None:
    before = sys.getswitchinterval()

    def check() -> None:
        assert sys.getswitchinterval() == before
        with yielding:
            assert sys.getswitchinterval() < before
        assert sys.getswitchinterval() == before

    with yielding:
        assert in_forked_child(check)
    assert sys.getswitchinterval() == before
