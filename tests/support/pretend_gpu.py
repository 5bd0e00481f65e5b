"""A GPU that is not there: Triton compiles for it, loads binaries and launches them, and all that is noted.

Run as a program it calls the low-rank operator's kernels on it and prints, as JSON, what was launched:

    python -m tests.support.pretend_gpu cuda:90

No kernel can be compiled meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from typing import Any

from esper_fx.kernels.targets import TARGETS, Target


class PretendGpu:
    """What Triton asks its driver for; the device's memory is PyTorch's device ``meta``.

    Attributes:
        launched: Name and SHA-256 of the binary of each launch.
    """

    def __init__(self, target: Target) -> None:
        from esper_fx.kernels import _triton

        self.target = _triton.gpu_target(target)
        self.shared_bytes = target.shared_bytes
        self.utils = self
        self.launched: list[tuple[str, str]] = []

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_bytes}

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return object(), (name, hashlib.sha256(code).hexdigest()), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda x, y, z, stream, function, *_: self.launched.append(function)


def forbid_compiling() -> None:
    """From now on compiling a kernel raises."""
    from triton.compiler.compiler import ASTSource

    def make_ir(self: Any, *_: Any) -> None:
        raise RuntimeError(f"{self.name} is being compiled")

    ASTSource.make_ir = make_ir


def run_low_rank(target: Target) -> list[tuple[str, str]]:
    """Forward and backward of the low-rank operator's kernels in bfloat16; returns what was launched."""
    import torch
    from torch._library.triton import set_wrap_triton_enabled
    from triton.runtime.driver import driver

    import esper_fx  # noqa: F401
    from esper_fx.kernels import low_rank

    gpu = PretendGpu(target)
    driver.set_active(gpu)
    forbid_compiling()
    # Another number of rows and other places of alpha and gate than the example call has: the same binaries serve them.
    x = torch.empty((3, 7, 512), dtype=torch.bfloat16, device="meta")
    down, up = x.new_empty((16, 512)).t(), x.new_empty((512, 16)).t()
    alpha, gate = torch.empty(5, device="meta")[1], torch.empty(5, device="meta")[3]
    with set_wrap_triton_enabled(False):  # as while an operator runs
        for _ in range(2):
            _, hidden, _ = low_rank.forward(x, down, up, alpha, "identity", -1, 0, save=True)
            low_rank.backward(x, x, hidden, down, up, alpha, gate, "identity", -1, 0)
    return gpu.launched


if __name__ == "__main__":
    launched = run_low_rank(TARGETS[sys.argv[1]])
    json.dump(launched, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # what was loaded is not there to be unloaded
