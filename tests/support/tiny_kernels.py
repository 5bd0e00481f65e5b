"""Two tiny kernels and one that brings the compiler's process down.

Run as a program it builds them and prints, as JSON, what became of them:

    python -m tests.support.tiny_kernels
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import triton
import triton.language as tl

from esper_fx.kernels.build import Job, build
from esper_fx.kernels.targets import TARGETS


@triton.jit
def double(x_ptr, BLOCK: tl.constexpr):
    places = x_ptr + tl.arange(0, BLOCK)
    tl.store(places, 2 * tl.load(places))


@triton.jit
def wrong(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.zeros([BLOCK + 1], tl.float32))


class _Crashing:
    @property
    def device_caches(self) -> Any:
        os.write(2, b"something\nLLVM ERROR: out of luck\nsomething else\n")
        os._exit(134)


crashing = _Crashing()

if __name__ == "__main__":
    import torch

    names = ["double", "crashing", "wrong", "double", "crashing", "double"]
    jobs = [
        Job(f"tests.support.tiny_kernels:{name}", (torch.float32,), (("BLOCK", 16 << place),), TARGETS["hip:gfx942"])
        for place, name in enumerate(names)
    ]
    done = {built.job: built for built in build(jobs, processes=2)}
    json.dump([(done[job].problem, done[job].binary is not None) for job in jobs], sys.stdout)
