"""What the engine has done for one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper_fx.cache import CacheStats

if TYPE_CHECKING:
    from esper_fx.engine.sized_program import SizedProgram
    from esper_fx.growth import Growth


@dataclass(frozen=True)
class EngineStats:
    """A snapshot; counts of the cache and the compiler are those of all models that share them.

    Attributes:
        programs: Compiled programs of the model that are alive.
        plans: For each program the plan in use: ``whole``, ``blocks`` or ``eager``.
        swaps: Times a program switched to another executable.
        kernels_compiled: Kernels compiled in worker processes.
        kernels_loaded: Kernels that came from the store.
        compile_seconds: Wall seconds of compilation in worker processes, off the training thread.
        foreground_compiles: Kernels that first calls compiled in this process.
        foreground_compile_seconds: Wall seconds of that.
        longest_step_host_ms: Longest time in milliseconds that the engine took on the training thread in one step.
        cache: Statistics of the kernel cache.
        recompiles: Recompiles by Dynamo of frames that hold seeds of the model.
    """

    programs: int
    plans: tuple[str, ...]
    swaps: int
    kernels_compiled: int
    kernels_loaded: int
    compile_seconds: float
    foreground_compiles: int
    foreground_compile_seconds: float
    longest_step_host_ms: float
    cache: CacheStats | None
    recompiles: int


def programs_of(growth: Growth) -> list[SizedProgram]:
    """The compiled programs of a model that are alive, in the order of their first calls. From any thread."""
    while True:
        try:
            return sorted(growth.changes.programs, key=lambda program: program.number)
        except RuntimeError:  # one has come or gone meanwhile, on another thread
            continue


def engine_stats(growth: Growth) -> EngineStats:
    """Collect the statistics of a model."""
    programs = programs_of(growth)
    shared = programs[0].service if programs else None
    cache = shared.cache.stats() if shared is not None else None
    return EngineStats(
        programs=len(programs),
        plans=tuple(program.plan for program in programs),
        swaps=growth.changes.swaps,
        kernels_compiled=0 if cache is None else cache.compiles,
        kernels_loaded=0 if cache is None or shared is None else cache.loads + shared.foreground_loads,
        compile_seconds=0.0 if cache is None else cache.compile_s_total,
        foreground_compiles=0 if shared is None else shared.foreground_compiles,
        foreground_compile_seconds=0.0 if shared is None else shared.foreground_seconds,
        longest_step_host_ms=growth.changes.longest_host * 1e3,
        cache=cache,
        recompiles=growth.changes.recompiles,
    )
