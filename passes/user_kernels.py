"""Triton kernels of the user's own in a graph. Dynamo leaves numbers for them there, which only its own process can read."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import fx

from esper_fx._torch import is_kernel_call, kernel_side_table
from esper_fx.passes.functions import resolve

#: The arguments of a call that are such numbers.
NUMBERS = ("kernel_idx", "constant_args_idx")


@dataclass(frozen=True)
class KernelCall:
    """What the numbers of a call stand for.

    Attributes:
        kernel: A ``triton.jit`` function, in whatever autotuner and heuristics wrap around it.
        constants: Arguments that a graph cannot hold.
    """

    kernel: Any
    constants: dict[str, Any]

    def describe(self) -> list[str]:
        """Texts that differ where the kernels compute something else."""
        kernel, texts = self.kernel, [repr(sorted((name, repr(value)) for name, value in self.constants.items()))]
        while hasattr(kernel.fn, "fn"):
            texts.append(repr([str(config) for config in getattr(kernel, "configs", ())]))
            texts += [f"{name}: {_code(rule)}" for name, rule in sorted(getattr(kernel, "values", {}).items())]
            kernel = kernel.fn
        name = f"{kernel.fn.__module__}.{kernel.fn.__qualname__}"
        return [*texts, name, str(getattr(kernel, "cache_key", None) or inspect.getsource(kernel.fn))]

    @property
    def path(self) -> str:
        """Where another process finds the kernel.

        Raises:
            TypeError: It would not.
        """
        function = self.kernel
        while hasattr(function, "fn"):
            function = function.fn
        path = f"{function.__module__}.{function.__qualname__}"
        if function.__module__ == "__main__" or _resolved(path) is not self.kernel:
            raise TypeError(
                f"the Triton kernel {path} cannot be found by the processes that compile: define it at the top level of a "
                "module that they can import"
            )
        return path


def kernel_call(node: fx.Node) -> KernelCall | None:
    """What a node's numbers stand for, if it calls a Triton kernel of the user's own."""
    if not is_kernel_call(node.target):
        return None
    table = kernel_side_table()
    kernel, constants = (node.kwargs[name] for name in NUMBERS)
    return KernelCall(table.get_kernel(kernel), table.get_constant_args(constants))


def numbers_of(path: str, constants: dict[str, Any]) -> dict[str, int]:
    """The numbers, in this process, of a kernel that another one calls."""
    table = kernel_side_table()
    return dict(zip(NUMBERS, (table.add_kernel(resolve(path)), table.add_constant_args(constants)), strict=True))


def _resolved(path: str) -> Any:
    try:
        return resolve(path)
    except AttributeError:
        return None


def _code(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return repr(function) if code is None else f"{code.co_code.hex()} {code.co_consts} {code.co_names}"
