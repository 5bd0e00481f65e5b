"""When kernels run, how they are launched or recorded instead, and the tile configurations that they come in."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

#: Activations by name; in kernels they are numbers, the positions here.
ACTIVATIONS = ("identity", "relu", "gelu", "silu")

#: Whether operators on CPU tensors run their kernels in Triton's interpreter.
_interpreting: ContextVar[bool] = ContextVar("esper_fx_interpreting", default=False)

#: Where launches go that are recorded instead of made.
_record: ContextVar[list[Launch] | None] = ContextVar("esper_fx_launch_record", default=None)


#: What is called with a kernel before it is launched for the first time on a device.
_preparations: list[Callable[[Any], object]] = []


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


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel.

    Attributes:
        kernel: A ``triton.jit`` function.
        grid: Number of programs in each dimension.
        args: Its tensors and numbers.
        constants: Its ``tl.constexpr`` parameters, and Triton's options such as ``num_warps``.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass(frozen=True)
class HiddenLaunch:
    """What a launch will compile that an operator hides from Inductor, as plain data.

    Attributes:
        kernel: Module and name: ``esper_fx.kernels.low_rank_rows:rows_kernel``.
        args: Its arguments: the names of tensors' dtypes, and numbers.
        constants: Its ``tl.constexpr`` parameters, and Triton's options.
    """

    kernel: str
    args: list[Any]
    constants: dict[str, Any]


def runs_kernels(x: Tensor) -> bool:
    """Whether an operator on this tensor runs Triton kernels; otherwise it is its ATen reference.

    Not on float64: kernels accumulate in float32.
    """
    return x.dtype != torch.float64 and (
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


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches made meanwhile instead of making them; for tensors on the device ``meta``."""
    launches: list[Launch] = []
    token = _record.set(launches)
    try:
        yield launches
    finally:
        _record.reset(token)


def kernel_name(kernel: Any) -> str:
    """Module and name of a kernel, by which another process finds it."""
    return f"{kernel.fn.__module__}:{kernel.fn.__name__}"  # fn: interpreted kernels have it too


def find_kernel(name: str) -> Any:
    """The kernel that :func:`kernel_name` says this of."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def hidden_launch(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> HiddenLaunch:
    """Describe a launch; arguments as for :func:`launch`, with dtypes for tensors."""
    plain = [str(arg).removeprefix("torch.") if isinstance(arg, torch.dtype) else arg for arg in args]
    return HiddenLaunch(kernel_name(kernel), plain, constants)


def compile_hidden(hidden: HiddenLaunch) -> None:
    """Compile what a launch will need on the current device, or find it compiled, so that the first launch need not."""
    kernel = find_kernel(hidden.kernel)
    args = [getattr(torch, arg) if isinstance(arg, str) else arg for arg in hidden.args]
    _prepare(kernel, torch.device("cuda", torch.cuda.current_device()))
    kernel.warmup(*args, grid=(1,), **hidden.constants)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    config: Config | None = None,
    traceable: bool = True,
    **constants: Any,
) -> None:
    """Launch a kernel, so that it is visible to whoever traces the operator around it.

    Args:
        kernel: A ``triton.jit`` function.
        grid: Number of programs in each dimension; nothing is launched where one is 0.
        *args: Its tensors and numbers.
        config: Its warps and pipeline stages; the tile sizes are among ``constants``, under the kernel's own names.
        traceable: Whether whoever traces can make something of it; otherwise it must be hidden in an operator.
        **constants: Its ``tl.constexpr`` parameters.
    """
    if 0 in grid:
        return
    if config is not None:
        constants |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    record = _record.get()
    if record is not None:
        record.append(Launch(kernel, grid, args, constants))
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if hasattr(kernel, "create_binder"):  # compiled; in the interpreter there is no such thing to trace
        _prepare(kernel, device)
        if traceable:
            kernel = torch.library.wrap_triton(kernel)
    here = device.type == "cuda" and torch.cuda.is_initialized()
    with torch.cuda.device(device) if here else contextlib.nullcontext():  # Triton launches on the current one
        kernel[grid](*args, **constants)


def before_first_launch(prepare: Callable[[Any], object]) -> None:
    """Have ``prepare(kernel)`` called before a kernel is launched for the first time on a device in this process.

    It may be called where the launch is only traced, and where there is no device.
    """
    _preparations.append(prepare)


@cache
def _prepare(kernel: Any, device: torch.device) -> None:
    for prepare in _preparations:
        prepare(kernel)


def exact(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are taken in full precision: float32, unless the user has allowed TF32."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"


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
