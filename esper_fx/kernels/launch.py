"""When kernels run, how they are launched, and the tile configurations that they come in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

#: Activations by name; in kernels they are numbers, the positions here.
ACTIVATIONS = ("identity", "relu", "gelu", "silu")

#: What kernels take.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Whether operators on CPU tensors run their kernels in Triton's interpreter.
_interpreting: ContextVar[bool] = ContextVar("esper_fx_interpreting", default=False)


@dataclass(frozen=True)
class Config:
    """A tile configuration of a kernel.

    Attributes:
        block_m: Rows (or positions) that one program handles at a time.
        block_d: Features that it handles at a time.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
    """

    block_m: int
    block_d: int
    num_warps: int
    num_stages: int


def runs_kernels(x: Tensor) -> bool:
    """Whether an operator on this tensor runs Triton kernels; otherwise it is its ATen reference.

    Not on float64: kernels accumulate in float32.
    """
    return x.dtype in DTYPES and (
        (x.is_cuda and find_spec("triton") is not None) or (x.device.type == "cpu" and _interpreting.get())
    )


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Let operators on CPU tensors run their kernels in Triton's interpreter; for tests.

    Only in a process that was started with ``TRITON_INTERPRET=1``: Triton decides when a kernel is defined.
    """
    token = _interpreting.set(True)
    try:
        yield
    finally:
        _interpreting.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, config: Config | None = None, **constants: Any) -> None:
    """Launch a kernel, so that it is visible to whoever traces the operator around it.

    Args:
        kernel: A ``triton.jit`` function.
        grid: Number of programs in each dimension; nothing is launched where one is 0.
        *args: Its tensors and numbers.
        config: Its warps and pipeline stages; the tile sizes are among ``constants``, under the kernel's own names.
        **constants: Its ``tl.constexpr`` parameters.
    """
    if 0 in grid:
        return
    if config is not None:
        constants |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if hasattr(kernel, "create_binder"):  # compiled; in the interpreter there is no such thing to trace
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](*args, **constants)


def exact(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are taken in full precision: float32, unless the user has allowed TF32."""
    return dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def padded(size: int, least: int = 16) -> int:
    """The smallest power of two from ``least`` that is not below ``size``."""
    return max(least, 1 << (size - 1).bit_length())


def pick(configs: Sequence[Config], number: int) -> Config:
    """The configuration with this number.

    Raises:
        ValueError: There is none.
    """
    if not 0 <= number < len(configs):
        raise ValueError(f"config={number}: expected 0 to {len(configs) - 1}")
    return configs[number]
