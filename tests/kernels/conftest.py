"""Kernels run on the GPU where there is one, and interpreted otherwise: by Triton, or, in Gluon, by ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch

from esper_fx.kernels import low_rank_rows
from esper_fx.kernels.launch import interpreting
from esper_fx.ops import low_rank_rows as operators
from tests.support import gluon, interpreter


@pytest.fixture(scope="module", autouse=True)
def _interpreted() -> Iterator[None]:
    if torch.cuda.is_available():
        yield
    else:
        interpreter.mend()
        with interpreting(), gluon_on_cpu(), numpy.errstate(all="ignore"):
            yield


@contextlib.contextmanager
def gluon_on_cpu() -> Iterator[None]:
    """Interpret the kernel in Gluon where tensors are on the CPU; programs that can take several tiles are two."""

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        gluon.launch(kernel, (min(grid[0], 2),) if constants["SEVERAL"] else grid, *args, **constants)

    library = torch.library.Library("esper", "IMPL")
    library.impl("low_rank_rows", operators._forward, "CPU")
    library.impl("low_rank_rows_backward", operators._backward, "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank_rows, "launch", launch)
        yield
    library._destroy()


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What `torch.empty` returns is NaN: an element that a kernel does not write is found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
