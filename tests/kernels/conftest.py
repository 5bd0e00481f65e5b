"""Kernels run on the GPU where there is one, and in Triton's interpreter otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import pytest
import torch

from esper_fx.kernels.launch import interpreting
from tests.support import interpreter


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    if torch.cuda.is_available():
        yield
    else:
        interpreter.mend()
        with interpreting(), numpy.errstate(all="ignore"):
            yield


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What `torch.empty` returns is NaN: an element that a kernel does not write is found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
