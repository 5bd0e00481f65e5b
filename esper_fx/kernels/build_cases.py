"""What is compiled ahead of time: example calls of the functions that launch kernels.

A file with kernels has a function ``build_cases()`` that yields them. An example call hands over tensors without data; the
launches that it makes are recorded (``launch.recording``) and compiled for a target. So whatever a launching function
passes to its kernels, their binaries fit it.

Sizes matter only in what Triton specialises on: a number or a stride that is 1, one that is divisible by 16, and any other
are three kinds. An example stands for all calls of its kind.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import esper_fx.kernels
from esper_fx.kernels.launch import Launch, recording
from esper_fx.kernels.targets import Target


@dataclass(frozen=True)
class BuildCase:
    """An example call.

    Attributes:
        dtype: The dtype it is about.
        label: What tells it from the other cases of its file and dtype, such as ``rank 16, config 0``.
        call: Calls launching functions, with tensors on the device ``meta``.
        default: Whether this is what runs unless a configuration was chosen: its kernels must not spill registers.
        runs_on: Whether it is for this target; others are left out.
    """

    dtype: torch.dtype
    label: str
    call: Callable[[], object]
    default: bool = True
    runs_on: Callable[[Target], bool] = lambda target: True

    def launches(self) -> list[Launch]:
        """The launches that the call makes."""
        with recording() as launches:
            self.call()
        return launches


def build_cases() -> Iterator[BuildCase]:
    """The cases of all files with kernels, file by file. Imports them all, so it needs triton."""
    for info in pkgutil.iter_modules(esper_fx.kernels.__path__, f"{esper_fx.kernels.__name__}."):
        if info.name != __name__:
            yield from getattr(importlib.import_module(info.name), "build_cases", tuple)()
