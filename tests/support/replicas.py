"""Processes that train replicas of a model, joined by gloo, whose results come back to the test."""

from __future__ import annotations

import importlib
import marshal
import multiprocessing
import os
import tempfile
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

TIMEOUT_S = 300

# Forks of a process that has imported everything and computed nothing: PyTorch for GPUs computes no gradients in other forks.
_context: Any = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["esper_fx"])


def in_replicas(function: Callable[[int], Any], processes: int = 2) -> list[Any]:
    """Call ``function(rank)`` in so many processes; returns what it returns, by rank.

    Each has a process group of all of them, of the backend gloo, and one thread. What one raises fails the test.

    Args:
        function: Any function, also one that is local to a test, if what it takes from there can be pickled.
        processes: How many.
    """
    with tempfile.TemporaryDirectory() as folder:
        queue = _context.Queue()
        children = [
            _context.Process(target=_run, args=(_packed(function), rank, processes, Path(folder) / "store", queue))
            for rank in range(processes)
        ]
        for child in children:
            child.start()
        try:
            answers = dict(queue.get(timeout=TIMEOUT_S) for _ in children)
        finally:
            for child in children:
                child.join(5)
                child.kill()
    errors = [f"process {rank}: {answer}" for rank, (failed, answer) in sorted(answers.items()) if failed]
    assert not errors, "\n".join(errors)
    return [answer for _, (_, answer) in sorted(answers.items())]


def _packed(function: Any) -> Any:
    """What can be pickled of a function: of a local one its module, its code, and what it takes from around it."""
    if "<locals>" not in getattr(function, "__qualname__", ""):
        return function
    taken = [cell.cell_contents for cell in function.__closure__ or ()]
    return function.__module__, marshal.dumps(function.__code__), taken


def _unpacked(packed: Any) -> Callable[[int], Any]:
    if not isinstance(packed, tuple):
        return packed  # type: ignore[no-any-return]
    module, code, taken = packed
    cells = tuple(types.CellType(value) for value in taken)
    return types.FunctionType(marshal.loads(code), vars(importlib.import_module(module)), closure=cells)


def _run(packed: Any, rank: int, processes: int, store: Path, queue: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
        answer = False, _unpacked(packed)(rank)
    except BaseException:
        answer = True, traceback.format_exc()
    queue.put((rank, answer))
    queue.close()
    queue.join_thread()
    os._exit(0)
