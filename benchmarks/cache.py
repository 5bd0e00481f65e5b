"""How soon a kernel can be launched: from the store, and from memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch

from benchmarks import training
from benchmarks.gpu_timing import require_gpu
from benchmarks.harness import Quantiles, quantiles
from benchmarks.options import Options
from benchmarks.report import Bar, Report, Row
from esper_fx import ArtifactStore, KernelCache, KernelKey, _torch
from esper_fx.engine.service import service

FROM_STORE_MS = Bar(at_most=10.0, aim=2.0)
FROM_MEMORY_US = Bar(at_most=10.0, aim=2.0)
LOOKUPS = 1000


def run(options: Options) -> Report:
    """Load the kernels of both plans of a small grown model from the store, and look them up in memory."""
    if options.device == "cuda":
        require_gpu()
    report = Report("cache")
    rounds = 10 if options.quick else 50
    for name in options.models:
        with training.empty_store():
            loop = training.esper_loop(training.case(name, options.seed, options.device))
            training.settle(loop)
            training.make_active(loop, {training.MIDDLE[name]: ("low_rank", {"rank": 8})})
            store, cache = service().store, service().cache
            assert store is not None
            kernels = [entry for entry in store.entries() if "compile_seconds" in entry.metadata]
            smallest = min(kernels, key=lambda entry: entry.nbytes)
            loads = _milliseconds(partial(_load, store, smallest.key), rounds)
            cache.put(smallest.key, object(), nbytes=1)
            lookups = _milliseconds(partial(_look_up, cache, smallest.key), rounds)
        note = f"a block, {smallest.nbytes / 1e3:.0f} kB, read, verified and loaded, {options.device}"
        report.add(Row(f"{name}: a kernel from the store", loads.p50, "ms", FROM_STORE_MS, loads, note))
        note = f"mean of {LOOKUPS} lookups"
        report.add(Row(f"{name}: a kernel from memory", lookups.p50, "µs", FROM_MEMORY_US, lookups, note))
    return report


def _load(store: ArtifactStore, key: KernelKey) -> object:
    data = store.get(key)
    assert data is not None
    return _torch.load_graph(data)


def _look_up(cache: KernelCache, key: KernelKey) -> None:
    for _ in range(LOOKUPS):
        cache.get(key)


def _milliseconds(call: Callable[[], object], rounds: int) -> Quantiles:
    """Of a call; what takes so many milliseconds for 1,000 lookups takes as many microseconds for one."""
    taken = []
    call()
    gc.collect()
    for _ in range(rounds):
        started = perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append((perf_counter() - started) * 1e3)
    return quantiles(taken)
