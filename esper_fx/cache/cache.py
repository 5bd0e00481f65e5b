"""The kernel cache: loaded kernels in memory, least recently used out first, and the flights that bring new ones."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from esper_fx.cache._background import DaemonPool, register_after_fork
from esper_fx.cache._memory import PinnedLru
from esper_fx.cache.job import Job, JobResult
from esper_fx.cache.key import KernelKey, digest_of
from esper_fx.cache.store import ArtifactStore
from esper_fx.checks import shown, whole
from esper_fx.errors import ArgumentError, KernelBuildError, SettingsError, StoreError

logger = logging.getLogger(__name__)

_LOAD_THREADS = 2
_LOAD_SAMPLES = 1024


class JobRunner(Protocol):
    """What the cache needs of a compiler; ``KernelCompiler`` is one."""

    def submit(self, job: Job) -> Future[JobResult]:
        """Runs the job somewhere and returns at once."""


@dataclass(frozen=True)
class CacheStats:
    """A snapshot of a cache's counters.

    Every ``get`` and ``fetch`` counts as exactly one hit, miss or join.

    Attributes:
        entries: Kernels in memory.
        bytes: Their artifacts' size.
        pinned: Kernels in memory that are pinned.
        in_flight: Kernels being loaded or compiled.
        hits: Lookups that found the kernel in memory.
        misses: Lookups that found nothing; those by ``fetch`` began a flight.
        joins: Fetches that joined a flight under way.
        loads: Kernels that came from the store.
        compiles: Artifacts that the compiler made.
        evictions: Kernels dropped to keep the bounds.
        failures: Flights that ended in an error.
        load_ms_p50: Median milliseconds that ``load`` took, over the latest 1024 calls; None before the first.
        load_ms_p99: The 99th percentile of the same.
        compile_s_total: Wall-clock seconds of compilation in workers.
        compile_cpu_s_total: CPU seconds of the same.
    """

    entries: int
    bytes: int
    pinned: int
    in_flight: int
    hits: int
    misses: int
    joins: int
    loads: int
    compiles: int
    evictions: int
    failures: int
    load_ms_p50: float | None
    load_ms_p99: float | None
    compile_s_total: float
    compile_cpu_s_total: float


@dataclass(frozen=True)
class _Flight:
    key: KernelKey
    load: Callable[[bytes], Any]
    build: Callable[[], Job]
    landed: Future[Any] = field(default_factory=Future)


class KernelCache:
    """Kernels in memory, bounded by number and by bytes, fetched from a store or a compiler when missing.

    At most one flight per key is under way, however many threads and asyncio tasks ask for it, and no lock is held
    while it loads or compiles. All methods may be called from any thread and any event loop.

    Args:
        max_entries: Most kernels in memory.
        max_bytes: Most bytes of artifacts in memory. A kernel above it is handed out but not kept, unless pinned.
        store: Where artifacts are looked up before compiling, and kept afterwards.
        compiler: What makes missing kernels; without one, a kernel that no store has cannot be fetched.

    Raises:
        SettingsError: A bound is no whole number from 1, or ``store`` or ``compiler`` is something else.
    """

    def __init__(
        self,
        *,
        max_entries: int = 256,
        max_bytes: int = 1 << 30,
        store: ArtifactStore | None = None,
        compiler: JobRunner | None = None,
    ) -> None:
        bounds = []
        for name, given in (("max_entries", max_entries), ("max_bytes", max_bytes)):
            if (bound := whole(given)) is None or bound < 1:
                raise SettingsError(f"{name}={shown(given)}: expected at least 1, a whole number")
            bounds.append(bound)
        if store is not None and (isinstance(store, type) or not hasattr(store, "quarantine")):
            raise SettingsError(
                f"store={shown(store)}: expected an ArtifactStore, such as ArtifactStore(folder), or None"
            )
        if compiler is not None and (isinstance(compiler, type) or not hasattr(compiler, "submit")):
            raise SettingsError(
                f"compiler={shown(compiler)}: expected a KernelCompiler, such as KernelCompiler(), or None"
            )
        self.store = store
        self.compiler = compiler
        # Reentrant: a finalizer may run in the middle of a method and unpin what its object used.
        self._lock = threading.RLock()
        self._memory = PinnedLru(*bounds)
        self._flights: dict[str, _Flight] = {}
        self._hits = self._misses = self._joins = self._loads = self._compiles = self._failures = 0
        self._load_ms: deque[float] = deque(maxlen=_LOAD_SAMPLES)
        self._compile_s = self._compile_cpu_s = 0.0
        self._pool = DaemonPool(_LOAD_THREADS, "esper_fx-cache")
        register_after_fork(self)

    def get(self, key: KernelKey) -> Any | None:
        """Returns the kernel if it is in memory, and marks it as used."""
        with self._lock:
            entry = self._memory.touch(digest_of(key))
            if entry is None:
                self._misses += 1
                return None
            self._hits += 1
            return entry.kernel

    def peek(self, key: KernelKey) -> Any | None:
        """Returns the kernel if it is in memory; neither recency nor statistics change."""
        entry = self._memory.entries.get(digest_of(key))
        return None if entry is None else entry.kernel

    def put(self, key: KernelKey, kernel: Any, *, nbytes: int) -> None:
        """Inserts a kernel made elsewhere, in place of the one that the key had.

        Raises:
            ArgumentError: ``nbytes`` is negative or no whole number.
        """
        digest, number = digest_of(key), whole(nbytes)
        if number is None or number < 0:
            raise ArgumentError(f"nbytes={shown(nbytes)} of kernel {key}: expected 0 or more, a whole number")
        with self._lock:
            dropped = self._memory.insert(digest, kernel, number)
        del dropped  # only now, outside the lock

    def fetch(self, key: KernelKey, *, load: Callable[[bytes], Any], build: Callable[[], Job]) -> Future[Any]:
        """Returns a future of the kernel: from memory, else from the store, else compiled.

        For a kernel in memory the future is complete. Otherwise it is shared by all who ask, and none of them can
        cancel it. A failed flight raises its error for all of them and is forgotten: the next fetch tries again.
        Stored bytes that do not load are quarantined and the kernel is compiled anew, once.

        Args:
            key: The kernel's address.
            load: Makes the kernel from its artifact's bytes. Runs on a thread of the cache.
            build: Makes the job that compiles the artifact. Called only if needed, on a thread of the cache.

        Returns:
            A future that raises ``KernelBuildError`` if the kernel could not be had.
        """
        digest = digest_of(key)
        with self._lock:
            entry = self._memory.touch(digest)
            if entry is not None:
                self._hits += 1
                return entry.done
            flight = self._flights.get(digest)
            if flight is not None:
                self._joins += 1
                return flight.landed
            self._misses += 1
            flight = self._flights[digest] = _Flight(key, load, build)
            flight.landed.set_running_or_notify_cancel()  # from here on nobody can cancel it for the others
        self._pool.submit(partial(self._take_off, flight))
        return flight.landed

    async def fetch_async(self, key: KernelKey, *, load: Callable[[bytes], Any], build: Callable[[], Job]) -> Any:
        """``fetch`` for coroutines, on any event loop; cancelling one waiter leaves the flight to the others."""
        future = self.fetch(key, load=load, build=build)
        return future.result() if future.done() else await asyncio.wrap_future(future)

    def pin(self, key: KernelKey) -> None:
        """Keeps the kernel from being evicted until ``unpin``; counted, and allowed before the kernel is there."""
        with self._lock:
            self._memory.pin(digest_of(key))

    def unpin(self, key: KernelKey) -> None:
        """Takes back one ``pin``; the cache then shrinks to its bounds.

        Raises:
            ArgumentError: The key is not pinned.
        """
        digest = digest_of(key)
        try:
            with self._lock:
                dropped = self._memory.unpin(digest)
        except KeyError:
            raise ArgumentError(f"kernel {key} is not pinned: every unpin needs a pin before it") from None
        del dropped

    def clear(self) -> None:
        """Drops all kernels that are not pinned. Flights, pins and statistics stay."""
        with self._lock:
            dropped = self._memory.clear()
        del dropped

    def stats(self) -> CacheStats:
        """A consistent snapshot of the counters."""
        with self._lock:
            samples = sorted(self._load_ms)
            return CacheStats(
                entries=len(self._memory.entries),
                bytes=self._memory.nbytes,
                pinned=self._memory.pinned,
                in_flight=len(self._flights),
                hits=self._hits,
                misses=self._misses,
                joins=self._joins,
                loads=self._loads,
                compiles=self._compiles,
                evictions=self._memory.evictions,
                failures=self._failures,
                load_ms_p50=_quantile(samples, 0.50),
                load_ms_p99=_quantile(samples, 0.99),
                compile_s_total=self._compile_s,
                compile_cpu_s_total=self._compile_cpu_s,
            )

    def __len__(self) -> int:
        return len(self._memory.entries)

    def __contains__(self, key: KernelKey) -> bool:
        return digest_of(key) in self._memory.entries

    def after_fork_in_child(self) -> None:
        """Keeps the kernels and forgets the flights: the threads that would land them stayed in the parent."""
        self._lock = threading.RLock()
        self._flights.clear()

    # A flight: _take_off on a thread of the cache; if a compiler has to be asked, _compiled on another, later.

    def _take_off(self, flight: _Flight) -> None:
        try:
            data = self.store.get(flight.key) if self.store is not None else None
            if data is not None:
                try:
                    kernel = self._load(flight, data)
                except Exception as error:
                    assert self.store is not None
                    self.store.quarantine(flight.key, f"it does not load ({type(error).__name__}: {error})")
                else:
                    with self._lock:
                        self._loads += 1
                    self._land(flight, kernel, len(data))
                    return
            if self.compiler is None:
                raise KernelBuildError(f"kernel {flight.key} is not in the store and the cache has no compiler")
            future = self.compiler.submit(flight.build())
            future.add_done_callback(lambda done: self._pool.submit(partial(self._compiled, flight, done)))
        except BaseException as error:  # whatever it is, the waiters must hear of it
            self._crash(flight, error)

    def _compiled(self, flight: _Flight, future: Future[JobResult]) -> None:
        try:
            result = future.result()
            with self._lock:
                self._compiles += 1
                self._compile_s += result.seconds
                self._compile_cpu_s += result.cpu_seconds
            kernel = self._load(flight, result.data)
            # Stored only after it has loaded: an artifact that brings the process down must not do so at every start.
            self._store(flight.key, result)
            self._land(flight, kernel, len(result.data))
        except BaseException as error:
            self._crash(flight, error)

    def _load(self, flight: _Flight, data: bytes) -> Any:
        started = time.perf_counter()
        kernel = flight.load(data)
        self._load_ms.append((time.perf_counter() - started) * 1e3)
        return kernel

    def _store(self, key: KernelKey, result: JobResult) -> None:
        if self.store is not None:
            try:
                self.store.put(key, result.data, metadata={"compile_seconds": result.seconds})
            except StoreError as error:  # the kernel works all the same
                logger.warning("%s", error)

    def _land(self, flight: _Flight, kernel: Any, nbytes: int) -> None:
        with self._lock:
            dropped = self._memory.insert(flight.key.digest, kernel, nbytes)
            self._flights.pop(flight.key.digest, None)
        del dropped
        flight.landed.set_result(kernel)

    def _crash(self, flight: _Flight, error: BaseException) -> None:
        if not isinstance(error, KernelBuildError):
            cause = error
            error = KernelBuildError(f"kernel {flight.key} could not be made: {type(cause).__name__}: {cause}")
            error.__cause__ = cause
        with self._lock:
            self._flights.pop(flight.key.digest, None)
            self._failures += 1
        flight.landed.set_exception(error)


def _quantile(ordered: list[float], fraction: float) -> float | None:
    return ordered[round(fraction * (len(ordered) - 1))] if ordered else None
