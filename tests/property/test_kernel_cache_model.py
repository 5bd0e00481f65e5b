"""KernelCache against a plain dict with the same rules, under flights that land late, fail, and have many waiters."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from esper_fx.cache import Job, JobResult, KernelCache, KernelKey
from esper_fx.errors import KernelBuildError
from tests.support.compilers import HandCompiler, job
from tests.support.processes import eventually

KEYS = [KernelKey.of(number=number) for number in range(5)]
keys = st.sampled_from(KEYS)
pinnable = st.sampled_from(KEYS[:2])  # or soon nothing could be evicted any more
sizes = st.integers(0, 12)


class Model:
    """The rules: a dict in order of use, oldest first, and what is pinned."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self.entries: dict[KernelKey, tuple[Any, int]] = {}
        self.pins: Counter[KernelKey] = Counter()
        self.counts: Counter[str] = Counter()

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.entries.values())

    def use(self, key: KernelKey) -> Any:
        entry = self.entries.pop(key, None)
        if entry is None:
            return None
        self.entries[key] = entry
        self.counts["hits"] += 1
        return entry[0]

    def insert(self, key: KernelKey, kernel: Any, nbytes: int) -> None:
        self.entries.pop(key, None)
        if nbytes <= self.max_bytes or self.pins[key]:
            self.entries[key] = (kernel, nbytes)
        self.shrink()

    def shrink(self) -> None:
        while len(self.entries) > self.max_entries or self.nbytes > self.max_bytes:
            victim = next((key for key in self.entries if not self.pins[key]), None)
            if victim is None:
                return
            del self.entries[victim]
            self.counts["evictions"] += 1


class Waiters:
    """Everybody who waits for one flight, on threads' futures and in tasks of an event loop."""

    def __init__(self, compiling: Future[JobResult]) -> None:
        self.compiling = compiling
        self.futures: list[Future[Any]] = []
        self.tasks: list[Future[Any]] = []


class CacheMachine(RuleBasedStateMachine):
    loop: asyncio.AbstractEventLoop

    @initialize(max_entries=st.integers(1, 4), max_bytes=st.integers(1, 60))
    def start(self, max_entries: int, max_bytes: int) -> None:
        self.compiler = HandCompiler()
        self.cache = KernelCache(max_entries=max_entries, max_bytes=max_bytes, compiler=self.compiler)
        self.model = Model(max_entries, max_bytes)
        self.flights: dict[KernelKey, Waiters] = {}
        self.serial = 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        try:
            for key in list(self.flights):
                self.finish(key, nbytes=1)
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.close()

    def load(self, data: bytes) -> str:
        if data == b"bad":
            raise ValueError("not a kernel")
        return f"kernel from {data!r}"

    def build(self) -> Job:
        self.serial += 1
        return job(str(self.serial).encode())

    def fetch(self, key: KernelKey, in_task: bool) -> Future[Any]:
        if not in_task:
            return self.cache.fetch(key, load=self.load, build=self.build)
        task = asyncio.run_coroutine_threadsafe(
            self.cache.fetch_async(key, load=self.load, build=self.build), self.loop
        )
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop).result()  # by now the task waits
        return task

    @rule(entries=st.lists(st.tuples(keys, sizes), max_size=5))
    def put(self, entries: list[tuple[KernelKey, int]]) -> None:
        for key, nbytes in entries:
            self.serial += 1
            kernel = f"put {self.serial}"
            self.cache.put(key, kernel, nbytes=nbytes)
            self.model.insert(key, kernel, nbytes)

    @rule(keys=st.lists(keys, max_size=5))
    def get(self, keys: list[KernelKey]) -> None:
        for key in keys:
            expected = self.model.use(key)
            assert self.cache.get(key) == expected
            self.model.counts["misses"] += expected is None

    @rule(key=pinnable)
    def pin(self, key: KernelKey) -> None:
        self.cache.pin(key)
        self.model.pins[key] += 1

    @rule(key=pinnable)
    def unpin(self, key: KernelKey) -> None:
        if not self.model.pins[key]:
            with pytest.raises(ValueError, match=f"kernel {key} is not pinned: every unpin needs a pin before it"):
                self.cache.unpin(key)
            return
        self.cache.unpin(key)
        self.model.pins[key] -= 1
        self.model.shrink()

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.model.entries = {key: entry for key, entry in self.model.entries.items() if self.model.pins[key]}

    @rule(key=keys, in_task=st.booleans())
    def begin_fetch(self, key: KernelKey, in_task: bool) -> None:
        expected = self.model.use(key)
        assert (key in self.cache) == (expected is not None)
        future = self.fetch(key, in_task)
        if expected is not None:
            assert future.result(timeout=10) == expected
            return
        if key in self.flights:
            self.model.counts["joins"] += 1
        else:
            self.model.counts["misses"] += 1
            self.flights[key] = Waiters(self.compiler.next()[1])
        (self.flights[key].tasks if in_task else self.flights[key].futures).append(future)

    @precondition(lambda self: self.flights)
    @rule(data=st.data())
    def cancel_a_waiter(self, data: st.DataObject) -> None:
        waiters = self.flights[data.draw(st.sampled_from(sorted(self.flights, key=str)))]
        if waiters.tasks:
            assert waiters.tasks.pop().cancel()
        for future in waiters.futures:
            assert not future.cancel()

    @precondition(lambda self: self.flights)
    @rule(data=st.data(), nbytes=sizes)
    def land(self, data: st.DataObject, nbytes: int) -> None:
        self.finish(data.draw(st.sampled_from(sorted(self.flights, key=str))), nbytes)

    def finish(self, key: KernelKey, nbytes: int) -> None:
        waiters = self.flights.pop(key)
        again = self.cache.fetch(key, load=self.load, build=self.build)  # one waiter at least, to wait for
        resident = self.model.use(key)  # a put may have come meanwhile
        self.model.counts["joins"] += resident is None
        self.serial += 1
        artifact = (b"%06d" % self.serial).ljust(nbytes, b".")[:nbytes]
        waiters.compiling.set_result(JobResult(artifact, 1.0, 0.5))
        kernel = f"kernel from {artifact!r}"
        self.model.counts["compiles"] += 1
        self.model.insert(key, kernel, nbytes)
        assert again.result(timeout=10) == (kernel if resident is None else resident)
        for future in [*waiters.futures, *waiters.tasks]:
            assert future.result(timeout=10) == kernel
        self.settle(key)

    @precondition(lambda self: self.flights)
    @rule(data=st.data(), at_load=st.booleans())
    def crash(self, data: st.DataObject, at_load: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.flights, key=str)))
        waiters = self.flights.pop(key)
        if at_load:
            waiters.compiling.set_result(JobResult(b"bad", 1.0, 0.5))
            self.model.counts["compiles"] += 1
        else:
            waiters.compiling.set_exception(KernelBuildError("no such operator"))
        message = "could not be made: ValueError: not a kernel" if at_load else "^no such operator$"
        for future in [*waiters.futures, *waiters.tasks]:
            with pytest.raises(KernelBuildError, match=message):
                future.result(timeout=10)
        self.model.counts["failures"] += 1
        self.settle(key)

    def settle(self, key: KernelKey) -> None:
        """Waits for a flight without waiters."""
        assert eventually(lambda: self.cache.stats().in_flight == len(self.flights))

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "cache"):
            return
        stats, model = self.cache.stats(), self.model
        assert {key: self.cache.peek(key) for key in KEYS if key in self.cache} == {
            key: kernel for key, (kernel, _) in model.entries.items()
        }
        assert len(self.cache) == stats.entries == len(model.entries)
        assert stats.bytes == model.nbytes
        assert stats.pinned == sum(model.pins[key] > 0 for key in model.entries)
        assert stats.in_flight == len(self.flights)
        assert stats.compile_s_total == 2 * stats.compile_cpu_s_total == model.counts["compiles"]
        for name in ("hits", "misses", "joins", "compiles", "evictions", "failures"):
            assert getattr(stats, name) == model.counts[name], name


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=50,
    stateful_step_count=40,
    phases=set(Phase) - {Phase.explain},  # which takes a minute here
)
