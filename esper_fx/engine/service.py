"""What all models of a process share: the kernel cache, the store, the compiler and the thread that waits for them."""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from esper_fx import _torch
from esper_fx.cache import ArtifactStore, Job, KernelCache, KernelCompiler, KernelKey
from esper_fx.cache._background import ForkSafeLock, register_after_fork
from esper_fx.engine import build
from esper_fx.errors import StoreError
from esper_fx.settings import Settings, settings

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Service:
    """The kernel cache and its loop, for one set of settings.

    Attributes:
        cache: Loaded kernels, in front of the store and the compiler.
        store: Artifacts on disk, or None.
        compiler: Worker processes, or None where there are none.
        foreground_seconds: Seconds that first calls spent compiling in this process.
        foreground_compiles: Kernels they compiled.
        foreground_loads: Kernels they loaded from the store.
    """

    cache: KernelCache
    store: ArtifactStore | None
    compiler: KernelCompiler | None
    foreground_seconds: float = 0.0
    foreground_compiles: int = 0
    foreground_loads: int = 0
    _loop: asyncio.AbstractEventLoop | None = None
    _lock: ForkSafeLock = field(default_factory=ForkSafeLock)

    def __post_init__(self) -> None:
        register_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Forgets the loop, whose thread stayed in the parent; a new one starts on demand."""
        self._loop = None

    def start_workers(self) -> None:
        """Start the worker processes; they warm up while the first call compiles."""
        if self.compiler is not None:
            self.compiler.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run a coroutine on the service's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop())

    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the service's thread, which is started when first asked for."""
        with self._lock:
            if self._loop is None or self._loop.is_closed():
                self._loop = asyncio.new_event_loop()
                thread = threading.Thread(target=_serve, args=(self._loop,), name="esper_fx-engine", daemon=True)
                thread.start()
                atexit.register(_stop, self._loop, thread)
            return self._loop

    def fetch(self, key: KernelKey, payload: Callable[[], bytes], priority: int) -> Future[Any]:
        """A future of the kernel: from memory, from the store, or compiled in a worker."""
        return self.cache.fetch(
            key, load=_torch.load_graph, build=lambda: Job(build.TARGET, payload(), priority=priority)
        )

    def obtain(self, key: KernelKey, compile_here: Callable[[ArtifactStore | None], tuple[Any, bytes]]) -> Any:
        """The kernel, now: from memory, from the store, or compiled in this process, which is what a first call does."""
        kernel = self.cache.get(key)
        if kernel is not None:
            return kernel
        data = self.store.get(key) if self.store is not None else None
        if data is not None:
            try:
                kernel = _torch.load_graph(data)
            except Exception as error:
                logger.warning("kernel %s from the store does not load (%s); it is compiled anew", key, error)
                assert self.store is not None
                self.store.quarantine(key, f"it does not load: {error}")
            else:
                self.foreground_loads += 1
                self.cache.put(key, kernel, nbytes=len(data))
                return kernel
        started = time.perf_counter()
        kernel, data = compile_here(self.store)
        self.foreground_seconds += time.perf_counter() - started
        self.foreground_compiles += 1
        self.cache.put(key, kernel, nbytes=len(data))
        if self.store is not None:
            try:
                self.store.put(key, data, metadata={"compile_seconds": time.perf_counter() - started})
            except StoreError as error:
                logger.warning("%s", error)
        return kernel


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if thread.is_alive() and not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5.0)


_services: dict[tuple[Any, ...], Service] = {}
_services_lock = ForkSafeLock()


def service() -> Service:
    """The service for the settings in force; equal settings share one.

    Raises:
        StoreError: The folder that the settings name for the store cannot be used.
    """
    current = settings()
    identity = _identity(current)
    with _services_lock:
        if identity not in _services:
            store = _store(current)
            if store is not None:
                threading.Thread(target=store.trim, args=(current.store_bytes,), daemon=True).start()
            compiler = None
            if current.workers:
                compiler = KernelCompiler(
                    workers=current.workers,
                    nice=current.worker_nice,
                    threads=current.worker_threads,
                    warm=build.WARM_TARGET,
                    job_timeout=current.job_timeout,
                )
            cache = KernelCache(
                max_entries=current.max_entries, max_bytes=current.max_bytes, store=store, compiler=compiler
            )
            _services[identity] = Service(cache, store, compiler)
        return _services[identity]


def _store(current: Settings) -> ArtifactStore | None:
    if not current.store:
        return None
    try:
        return ArtifactStore(current.cache_dir)
    except StoreError as error:
        if current.cache_dir is not None:
            raise
        logger.warning("kernels are not kept on disk: %s", error)  # the user has not asked for this folder
        return None


def _identity(current: Settings) -> tuple[Any, ...]:
    return (
        current.cache_dir,
        current.store,
        current.store_bytes,
        current.workers,
        current.worker_nice,
        current.worker_threads,
        current.job_timeout,
        current.max_entries,
        current.max_bytes,
    )
