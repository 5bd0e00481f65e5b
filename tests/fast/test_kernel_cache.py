"""KernelCache: one flight a key for everybody, no lock held meanwhile, and nothing bad is kept."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from esper_fx.cache import ArtifactStore, Job, JobResult, KernelCache, KernelCompiler, KernelKey
from esper_fx.errors import KernelBuildError, SettingsError, StoreError
from tests.support.compilers import EchoCompiler, HandCompiler, job
from tests.support.processes import eventually, in_forked_child

KEYS = [KernelKey.of(number=number) for number in range(8)]
KEY = KEYS[0]


class Kernel:
    """A kernel that knows its artifact; unlike bytes it can be referred to weakly and compared by identity."""

    def __init__(self, data: bytes) -> None:
        self.data = data


def never(*_: object) -> Any:
    raise AssertionError("not needed")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "kernels")


def get(cache: KernelCache, key: KernelKey = KEY, data: bytes = b"artifact") -> Kernel:
    kernel: Kernel = cache.fetch(key, load=Kernel, build=lambda: job(data)).result(timeout=10)
    return kernel


class TestSingleFlight:
    def test_many_threads_and_event_loops_share_one_flight_a_key(self) -> None:
        compiler = EchoCompiler()
        cache = KernelCache(compiler=compiler)
        loaded: list[bytes] = []

        def load(data: bytes) -> Kernel:
            loaded.append(data)
            time.sleep(0.002)  # long enough for others to come by
            return Kernel(data)

        def arguments(key: KernelKey) -> dict[str, Any]:
            return {"load": load, "build": lambda: job(key.digest.encode())}

        barrier = threading.Barrier(12)

        def ask_from_a_thread() -> list[Kernel]:
            barrier.wait()
            return [future.result(timeout=10) for future in [cache.fetch(key, **arguments(key)) for key in KEYS]]

        def ask_from_a_loop() -> list[Kernel]:
            async def ask() -> list[Kernel]:
                return list(await asyncio.gather(*(cache.fetch_async(key, **arguments(key)) for key in KEYS)))

            barrier.wait()
            return asyncio.run(ask())

        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(ask) for ask in [ask_from_a_thread] * 8 + [ask_from_a_loop] * 4]
            answers = [future.result() for future in asked]
        expected = [cache.peek(key) for key in KEYS]
        assert all(isinstance(kernel, Kernel) for kernel in expected)
        for answer in answers:
            assert all(one is other for one, other in zip(answer, expected, strict=True))
        assert sorted(loaded) == sorted(compiler.payloads) == sorted(key.digest.encode() for key in KEYS)
        stats = cache.stats()
        assert stats.hits + stats.misses + stats.joins == 12 * len(KEYS)
        assert stats.misses == stats.compiles == len(KEYS)
        assert stats.in_flight == 0

    def test_a_resident_kernel_comes_at_once(self) -> None:
        cache = KernelCache()
        cache.put(KEY, "kernel", nbytes=1)
        future = cache.fetch(KEY, load=never, build=never)
        assert future.done()
        assert future.result() == "kernel"

        async def ask() -> Any:
            coroutine = cache.fetch_async(KEY, load=never, build=never)
            with pytest.raises(StopIteration) as stopped:
                coroutine.send(None)  # runs to its end without ever giving way
            return stopped.value.value

        assert asyncio.run(ask()) == "kernel"

    def test_build_and_load_run_on_other_threads(self) -> None:
        cache = KernelCache(compiler=EchoCompiler())
        threads: list[threading.Thread] = []

        def build() -> Job:
            threads.append(threading.current_thread())
            return job(b"x")

        def load(data: bytes) -> bytes:
            threads.append(threading.current_thread())
            return data

        assert cache.fetch(KEY, load=load, build=build).result(timeout=10) == b"x"
        assert len(threads) == 2
        assert threading.current_thread() not in threads
        assert all(thread.daemon for thread in threads)

    def test_slow_compiles_do_not_hold_up_loads(self, store: ArtifactStore) -> None:
        compiler = HandCompiler()
        cache = KernelCache(compiler=compiler, store=store)
        compiling = [cache.fetch(key, load=Kernel, build=lambda: job(b"")) for key in KEYS[1:]]
        futures = [compiler.next()[1] for _ in compiling]
        store.put(KEY, b"stored", metadata={})
        assert cache.fetch(KEY, load=Kernel, build=never).result(timeout=10).data == b"stored"
        assert not any(future.done() for future in compiling)
        for future in futures:
            future.set_result(JobResult(b"late", 0.0, 0.0))
        assert [future.result(timeout=10).data for future in compiling] == [b"late"] * len(compiling)


class TestNoLockIsHeld:
    """While something slow goes on, every method of the cache returns."""

    def use_everything(self, cache: KernelCache) -> None:
        """Fails where a lock is held: its thread does not come to the end."""
        used: list[KernelKey] = []

        def use() -> None:
            key = KEYS[-1]
            cache.put(key, "other", nbytes=0)
            assert cache.get(key) == cache.peek(key) == "other"
            assert cache.fetch(key, load=never, build=never).result() == "other"
            cache.pin(key)
            cache.unpin(key)
            cache.stats()
            cache.clear()
            used.append(key)

        thread = threading.Thread(target=use, daemon=True)
        thread.start()
        thread.join(timeout=10)
        assert used == [KEYS[-1]]

    @pytest.mark.parametrize("slow", ["build", "compile", "load", "store.get", "store.put"])
    def test_while_it(self, slow: str, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
        begun, go_on = threading.Event(), threading.Event()

        def slowly(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                if name == slow:
                    begun.set()
                    assert go_on.wait(timeout=10)
                return function(*arguments, **options)

            return call

        compiler = EchoCompiler()
        monkeypatch.setattr(compiler, "submit", slowly("compile", compiler.submit))
        monkeypatch.setattr(store, "get", slowly("store.get", store.get))
        monkeypatch.setattr(store, "put", slowly("store.put", store.put))
        cache = KernelCache(compiler=compiler, store=store)
        future = cache.fetch(KEY, load=slowly("load", Kernel), build=slowly("build", lambda: job(b"x")))
        assert begun.wait(timeout=10)
        self.use_everything(cache)
        assert not future.done()
        go_on.set()
        assert future.result(timeout=10).data == b"x"

    @pytest.mark.parametrize("drop", ["evict", "replace", "clear", "unpin", "land"])
    def test_while_a_dropped_kernel_is_finalized(self, drop: str) -> None:
        cache = KernelCache(max_bytes=10, compiler=EchoCompiler())
        finalized = threading.Event()

        class Slow:
            def __del__(self) -> None:
                test.use_everything(cache)
                finalized.set()

        test = self
        if drop == "unpin":
            for key in KEYS[:2]:
                cache.pin(key)
            cache.put(KEYS[1], "fills the cache", nbytes=10)
        cache.put(KEY, Slow(), nbytes=1)
        if drop == "evict":
            cache.put(KEYS[1], "large", nbytes=10)
        elif drop == "replace":
            cache.put(KEY, "new", nbytes=1)
        elif drop == "clear":
            cache.clear()
        elif drop == "unpin":
            cache.unpin(KEY)
        else:
            get(cache, KEYS[1], b"0123456789")
        assert finalized.wait(timeout=10)

    def test_a_finalizer_may_use_the_cache_from_within(self) -> None:
        cache = KernelCache()

        class Unpins:
            def __del__(self) -> None:
                cache.unpin(KEY)

        cache.pin(KEY)
        cache.put(KEY, Unpins(), nbytes=1)
        cache.put(KEY, "new", nbytes=1)
        with pytest.raises(ValueError, match="is not pinned"):
            cache.unpin(KEY)


class TestCancellation:
    def test_one_waiter_leaves_the_flight_to_the_others(self) -> None:
        compiler = HandCompiler()
        cache = KernelCache(compiler=compiler)

        async def scene() -> list[Any]:
            asked = [
                asyncio.ensure_future(cache.fetch_async(KEY, load=Kernel, build=lambda: job(b""))) for _ in range(3)
            ]
            await asyncio.sleep(0)
            asked[0].cancel()  # the one that began the flight
            asked[1].cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked[0]
            compiler.next()[1].set_result(JobResult(b"x", 0.0, 0.0))
            return [await asked[2], asked[1].cancelled()]

        kernel, cancelled = asyncio.run(scene())
        assert kernel is cache.peek(KEY)
        assert kernel.data == b"x"
        assert cancelled

    def test_the_flight_lands_when_all_waiters_and_their_loop_are_gone(self, caplog: pytest.LogCaptureFixture) -> None:
        compiler = HandCompiler()
        cache = KernelCache(compiler=compiler)

        async def give_up() -> None:
            with pytest.raises(asyncio.TimeoutError):
                async with asyncio.timeout(0.01):
                    await cache.fetch_async(KEY, load=Kernel, build=lambda: job(b""))

        asyncio.run(give_up())
        compiler.next()[1].set_result(JobResult(b"x", 0.0, 0.0))
        assert eventually(lambda: KEY in cache)
        assert eventually(lambda: cache.stats().in_flight == 0)
        assert not caplog.records

    def test_a_future_cannot_be_cancelled_by_one_of_those_who_share_it(self) -> None:
        compiler = HandCompiler()
        cache = KernelCache(compiler=compiler)
        future = cache.fetch(KEY, load=Kernel, build=lambda: job(b""))
        assert not future.cancel()
        compiler.next()[1].set_result(JobResult(b"x", 0.0, 0.0))
        assert future.result(timeout=10).data == b"x"


class TestFailure:
    def check(self, cache: KernelCache, build: Callable[[], Job], message: str, load: Any = Kernel) -> KernelBuildError:
        """The flight fails with this message and is forgotten: the next one succeeds."""
        with pytest.raises(KernelBuildError, match=message) as caught:
            cache.fetch(KEY, load=load, build=build).result(timeout=10)
        assert KEY not in cache
        assert cache.stats().failures == 1
        cache.compiler = EchoCompiler()
        assert get(cache).data == b"artifact"
        return caught.value

    def test_of_build(self) -> None:
        error = self.check(
            KernelCache(compiler=EchoCompiler()), lambda: {}["x"], f"kernel {KEY} could not be made: KeyError: 'x'"
        )
        assert isinstance(error.__cause__, KeyError)

    def test_of_build_by_exit(self) -> None:
        def build() -> Job:
            raise SystemExit(1)

        self.check(KernelCache(compiler=EchoCompiler()), build, "could not be made: SystemExit: 1")

    def test_of_load(self) -> None:
        def load(data: bytes) -> Kernel:
            raise ValueError("wrong magic number")

        self.check(KernelCache(compiler=EchoCompiler()), lambda: job(b"x"), "ValueError: wrong magic number", load=load)

    def test_of_the_compiler(self) -> None:
        class Broken:
            def submit(self, job: Job) -> Future[JobResult]:
                future: Future[JobResult] = Future()
                future.set_exception(KernelBuildError("no such operator", worker_traceback="in the worker"))
                return future

        error = self.check(KernelCache(compiler=Broken()), lambda: job(b"x"), "^no such operator$")
        assert error.worker_traceback == "in the worker"

    def test_of_submitting(self) -> None:
        compiler = KernelCompiler()
        compiler.close()
        self.check(KernelCache(compiler=compiler), lambda: job(b"x"), "was submitted to a closed kernel compiler")

    def test_of_a_cancelled_job(self) -> None:
        class Cancels:
            def submit(self, job: Job) -> Future[JobResult]:
                future: Future[JobResult] = Future()
                future.cancel()
                return future

        self.check(KernelCache(compiler=Cancels()), lambda: job(b"x"), "could not be made: CancelledError")

    def test_for_want_of_a_compiler(self) -> None:
        self.check(KernelCache(), never, f"kernel {KEY} is not in the store and the cache has no compiler")

    def test_every_waiter_hears_of_it(self) -> None:
        compiler = HandCompiler()
        cache = KernelCache(compiler=compiler)
        futures = [cache.fetch(KEY, load=Kernel, build=lambda: job(b"")) for _ in range(3)]

        async def wait() -> None:
            waiting = asyncio.ensure_future(cache.fetch_async(KEY, load=Kernel, build=lambda: job(b"")))
            await asyncio.sleep(0)
            compiler.next()[1].set_exception(KernelBuildError("no"))
            with pytest.raises(KernelBuildError, match=r"^no$"):
                await waiting

        asyncio.run(wait())
        for future in futures:
            with pytest.raises(KernelBuildError, match=r"^no$"):
                future.result(timeout=10)
        assert cache.stats().failures == 1


class TestStore:
    def test_a_second_cache_needs_no_compiler(self, store: ArtifactStore) -> None:
        first = KernelCache(compiler=EchoCompiler(seconds=3.0), store=store)
        assert get(first).data == b"artifact"
        manifest = store.manifest(KEY)
        assert manifest is not None
        assert manifest.metadata == {"compile_seconds": 3.0}
        assert manifest.key.parts == KEY.parts
        second = KernelCache(store=store)
        assert second.fetch(KEY, load=Kernel, build=never).result(timeout=10).data == b"artifact"
        assert (second.stats().loads, second.stats().compiles) == (1, 0)
        assert (first.stats().loads, first.stats().compiles) == (0, 1)
        assert first.stats().compile_s_total == 3.0
        assert second.stats().bytes == first.stats().bytes == len(b"artifact")

    def test_stored_bytes_that_do_not_load_are_quarantined_and_compiled_anew_once(
        self, store: ArtifactStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        def load(data: bytes) -> Kernel:
            if data == b"stale":
                raise ImportError("an older torch")
            return Kernel(data)

        store.put(KEY, b"stale", metadata={})
        compiler = EchoCompiler()
        cache = KernelCache(compiler=compiler, store=store)
        assert cache.fetch(KEY, load=load, build=lambda: job(b"fresh")).result(timeout=10).data == b"fresh"
        assert compiler.payloads == [b"fresh"]
        assert store.get(KEY) == b"fresh"
        (record,) = caplog.records
        assert record.getMessage().endswith("quarantine/: it does not load (ImportError: an older torch)")
        assert cache.stats().failures == 0

    def test_an_artifact_that_never_loads_is_compiled_once_and_not_stored(self, store: ArtifactStore) -> None:
        compiler = EchoCompiler()
        cache = KernelCache(compiler=compiler, store=store)
        with pytest.raises(KernelBuildError, match="could not be made: ZeroDivisionError"):
            cache.fetch(KEY, load=lambda data: 1 // 0, build=lambda: job(b"x")).result(timeout=10)
        assert compiler.payloads == [b"x"]
        assert not store.contains(KEY)

    def test_a_store_that_cannot_be_written_to_costs_a_warning_only(
        self, store: ArtifactStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise StoreError("the disk is full")

        monkeypatch.setattr(store, "put", full)
        cache = KernelCache(compiler=EchoCompiler(), store=store)
        assert get(cache).data == b"artifact"
        assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
            (logging.WARNING, "the disk is full")
        ]

    def test_the_artifact_is_stored_when_the_kernel_is_handed_out(self, store: ArtifactStore) -> None:
        cache = KernelCache(compiler=EchoCompiler(), store=store)
        stored: list[bool] = []
        future = cache.fetch(KEY, load=Kernel, build=lambda: job(b"x"))
        future.add_done_callback(lambda _: stored.append(store.contains(KEY)))
        future.result(timeout=10)
        assert eventually(lambda: stored)
        assert stored == [True]


class TestBounds:
    def test_the_least_recently_used_goes_first(self) -> None:
        cache = KernelCache(max_entries=2)
        for key in KEYS[:2]:
            cache.put(key, key.digest, nbytes=1)
        cache.get(KEYS[0])
        cache.peek(KEYS[1])  # does not count as use
        cache.put(KEYS[2], "new", nbytes=1)
        assert [key in cache for key in KEYS[:3]] == [True, False, True]

    def test_bytes_count_too(self) -> None:
        cache = KernelCache(max_bytes=100)
        for key in KEYS[:4]:
            cache.put(key, key.digest, nbytes=40)
        assert [key in cache for key in KEYS[:4]] == [False, False, True, True]
        assert cache.stats().bytes == 80

    def test_a_kernel_above_the_bound_is_handed_out_but_displaces_nobody(self) -> None:
        cache = KernelCache(max_bytes=4, compiler=EchoCompiler())
        cache.put(KEYS[1], "small", nbytes=1)
        assert get(cache, data=b"large").data == b"large"
        assert KEY not in cache
        assert KEYS[1] in cache

    def test_pins_are_counted_hold_beyond_the_bounds_and_may_come_first(self) -> None:
        cache = KernelCache(max_bytes=4, max_entries=1, compiler=EchoCompiler())
        cache.pin(KEY)
        cache.pin(KEY)
        get(cache, data=b"large")
        cache.unpin(KEY)
        cache.put(KEYS[1], "small", nbytes=1)
        cache.clear()
        assert [key in cache for key in KEYS[:2]] == [True, False]
        cache.unpin(KEY)
        assert len(cache) == cache.stats().bytes == 0

    @pytest.mark.parametrize("bound", [0, -1])
    def test_of_less_than_one_are_refused(self, bound: int) -> None:
        with pytest.raises(SettingsError, match=f"max_entries={bound}: expected at least 1"):
            KernelCache(max_entries=bound)
        with pytest.raises(SettingsError, match=f"max_bytes={bound}: expected at least 1"):
            KernelCache(max_bytes=bound)

    def test_a_negative_size_is_refused(self) -> None:
        with pytest.raises(ValueError, match=f"nbytes=-1 of kernel {KEY}: expected 0 or more"):
            KernelCache().put(KEY, "kernel", nbytes=-1)


def test_load_times_are_quantiles_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KernelCache(compiler=EchoCompiler())
    assert (cache.stats().load_ms_p50, cache.stats().load_ms_p99) == (None, None)
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    for number in range(101):

        def load(data: bytes, number: int = number) -> bytes:
            clock[0] += number / 1e3
            return data

        cache.fetch(KernelKey.of(n=number), load=load, build=lambda: job(b"")).result(timeout=10)
    assert cache.stats().load_ms_p50 == pytest.approx(50.0)
    assert cache.stats().load_ms_p99 == pytest.approx(99.0)


def test_a_cache_that_is_dropped_takes_its_threads_along() -> None:
    before = set(threading.enumerate())
    cache = KernelCache(compiler=EchoCompiler())
    for key in KEYS:
        get(cache, key)
    threads = set(threading.enumerate()) - before
    assert threads
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert eventually(lambda: (gc.collect() and False) or gone() is None)
    assert eventually(lambda: not any(thread.is_alive() for thread in threads))


def test_a_forked_child_keeps_the_kernels_and_makes_flights_of_its_own() -> None:
    compiler = HandCompiler()
    cache = KernelCache(compiler=compiler)
    cache.put(KEYS[1], "kernel", nbytes=1)
    cache.fetch(KEYS[2], load=Kernel, build=lambda: job(b""))  # by now the cache has all its threads
    compiler.next()
    parents = cache.fetch(KEY, load=Kernel, build=lambda: job(b""))
    _, compiling = compiler.next()

    def check() -> None:
        assert cache.get(KEYS[1]) == "kernel"
        cache.compiler = EchoCompiler()
        assert get(cache, data=b"child's").data == b"child's"

    held, release = threading.Event(), threading.Event()

    def hold_the_lock() -> None:
        with cache._lock:  # at the worst moment
            held.set()
            release.wait(timeout=20)

    thread = threading.Thread(target=hold_the_lock)
    thread.start()
    held.wait()
    try:
        assert in_forked_child(check)
    finally:
        release.set()
        thread.join()
    compiling.set_result(JobResult(b"parent's", 0.0, 0.0))
    assert parents.result(timeout=10).data == b"parent's"


def test_the_whole_way_with_worker_processes_and_a_store(store: ArtifactStore) -> None:
    with KernelCompiler(nice=0) as compiler:
        cache = KernelCache(compiler=compiler, store=store)
        target = "tests.support.cache_jobs:doubled"

        async def ask() -> list[Kernel]:
            return list(
                await asyncio.gather(
                    *(
                        cache.fetch_async(key, load=Kernel, build=lambda key=key: Job(target, key.digest.encode()))
                        for key in KEYS * 2
                    )
                )
            )

        kernels = asyncio.run(ask())
    assert [kernel.data for kernel in kernels] == [(key.digest * 2).encode() for key in KEYS * 2]
    assert all(store.get(key) == (key.digest * 2).encode() for key in KEYS)
    assert compiler.stats().completed == cache.stats().compiles == len(KEYS)
