"""The GPUs that kernels are compiled for ahead of time, and what a program may use there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from esper_fx.errors import TargetError

_KIB = 1024


@dataclass(frozen=True)
class Target:
    """A kind of GPU.

    Attributes:
        backend: ``cuda`` or ``hip``.
        arch: Compute capability times ten, or the name of the architecture.
        warp_size: Threads per warp.
        shared_bytes: Shared memory that one program may use.
        thread_registers: Registers of 32 bits that one thread may use.
        program_registers: Registers that the threads of one program may use together.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    thread_registers: int
    program_registers: int

    @property
    def name(self) -> str:
        """As it is given on the command line: ``cuda:90``."""
        return f"{self.backend}:{self.arch}"


# CUDA C++ Programming Guide, technical specifications per compute capability; AMD's instruction set architecture guides.
# On CDNA a thread's registers are vector and accumulation registers together, 512 of them where a program has four warps.
TARGETS = {
    target.name: target
    for target in (
        *(Target("cuda", arch, 32, 163 * _KIB, 255, 65_536) for arch in (80, 87)),
        *(Target("cuda", arch, 32, 99 * _KIB, 255, 65_536) for arch in (86, 89, 120, 121)),
        *(Target("cuda", arch, 32, 227 * _KIB, 255, 65_536) for arch in (90, 100, 103)),
        *(Target("hip", arch, 64, 64 * _KIB, 512, 131_072) for arch in ("gfx90a", "gfx942")),
        Target("hip", "gfx950", 64, 160 * _KIB, 512, 131_072),
    )
}


def parse_targets(names: str | Iterable[str]) -> tuple[Target, ...]:
    """The targets with these names, each once, in this order.

    Args:
        names: Names such as ``cuda:90``, or one text of them with commas in between.

    Raises:
        TargetError: A target is not known, or none is named.
    """
    found = {}
    for name in names.split(",") if isinstance(names, str) else names:
        target = TARGETS.get(name.strip())
        if target is None:
            raise TargetError(f"target {name.strip()!r} is not known: expected one of {', '.join(TARGETS)}")
        found[target.name] = target
    if not found:
        raise TargetError(f"no target is named: expected some of {', '.join(TARGETS)}")
    return tuple(found.values())
