"""What a compiled kernel uses of a GPU, as the assemblers report it, and whether that is within the limits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from esper_fx.kernels.targets import Target

# Columns of tensor memory that one program may use, where there is any.
_TENSOR_MEMORY = 512


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses.

    Attributes:
        registers: Registers of 32 bits per thread.
        spilled: Bytes per thread that do not fit the registers and go through memory.
        shared: Bytes of shared memory per program.
        tensor_memory: Columns of tensor memory per program.
        warps: Warps per program.
    """

    registers: int
    spilled: int
    shared: int
    tensor_memory: int
    warps: int


def registers_of_ptxas(log: str) -> tuple[int, int]:
    """Registers and spilled bytes per thread from what ``ptxas -v`` says.

    Raises:
        ValueError: It does not say them.
    """
    registers = [int(count) for count in re.findall(r"\bUsed (\d+) registers", log)]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        raise ValueError(
            f"expected the registers and spills of a kernel in the output of ptxas -v, found {log[:200]!r}"
        )
    return max(registers), sum(max(int(stored), int(loaded)) for stored, loaded in spills)


def registers_of_amdgcn(assembly: str) -> tuple[int, int]:
    """Registers and spilled bytes per thread from the metadata at the end of AMD assembly; a spilled register is 4 bytes.

    Raises:
        ValueError: There is no such metadata.
    """
    counts = {}
    for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count"):
        found = re.search(rf"^\s*\.{name}:\s*(\d+)\s*$", assembly, re.MULTILINE)
        if found is None:
            raise ValueError(f"expected .{name} in the metadata of AMD assembly, found none")
        counts[name] = int(found[1])
    return counts["vgpr_count"], 4 * (counts["vgpr_spill_count"] + counts["sgpr_spill_count"])


def excesses(used: Resources, target: Target) -> list[str]:
    """What of this a program cannot have on the target: such a kernel compiles, but cannot be launched."""
    program = used.registers * used.warps * target.warp_size
    limits = (
        (used.shared, target.shared_bytes, "bytes of shared memory"),
        (used.registers, target.thread_registers, "registers per thread"),
        (program, target.program_registers, f"registers of {used.warps} warps"),
        (used.tensor_memory, _TENSOR_MEMORY, "columns of tensor memory"),
    )
    return [f"{amount} {what}, at most {limit}" for amount, limit, what in limits if amount > limit]
