"""Every internal of Triton that esper_fx touches, in one place. Run on triton 3.6.0, 3.7.1, 3.8.0 and 3.9.0."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import get_cache_invalidating_env_vars, get_cache_key, get_cache_manager, make_backend
from triton.runtime.driver import driver

from esper_fx.kernels.targets import Target

#: Longest part of a kernel's name in the names of its files in Triton's cache.
_NAME_LENGTH = 150


class _AbsentDevice:
    """What Triton asks its driver for when it compiles but does not launch."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_device(self) -> str:  # compiled kernels are kept by device, so one for each target
        return str(self._target)

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def gpu_target(target: Target) -> Any:
    """The target as Triton names it."""
    return GPUTarget(target.backend, target.arch, target.warp_size)


def current_target() -> Any | None:
    """The target of the current device as Triton names it; None where Triton finds no device."""
    try:
        return driver.active.get_current_target()
    except RuntimeError:  # no GPU, or more than one kind of driver
        return None


def identity(kernel: Any, target: Any) -> dict[str, str]:
    """What the binaries of a kernel depend on besides arguments and options: sources, target, versions, environment."""
    return {
        "kernel": f"{kernel.__module__}.{kernel.__name__}",
        "source": kernel.cache_key,
        "target": f"{target.backend}:{target.arch}:{target.warp_size}",
        "triton": triton.__version__,
        "toolchain": make_backend(target).hash(),
        "environment": json.dumps(sorted(get_cache_invalidating_env_vars().items())),
    }


def compile_for(target: Any, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, str, str]:
    """Compile a kernel as a launch with these arguments would on a device of this kind.

    For processes that only compile: the driver is replaced for good, and nothing compiled is found again.

    Args:
        target: As Triton names it.
        kernel: A ``triton.jit`` function.
        args: Dtypes of tensors, and numbers.
        constants: Its ``tl.constexpr`` parameters and Triton's options.

    Returns:
        Triton's ``CompiledKernel``; the options it was compiled with as JSON; what the assembler said.
    """
    options: list[str] = []

    def note(**event: Any) -> None:
        options.append(json.dumps(json.loads(event["compile"]["specialization_data"])["options"]))

    driver.set_active(_AbsentDevice(target))
    knobs.compilation.always_compile = True  # what comes out of a cache, no assembler reports about
    knobs.nvidia.dump_ptxas_log = True
    knobs.runtime.jit_post_compile_hook = note
    kernel.device_caches.clear()
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = kernel.warmup(*args, grid=(1,), **constants)
    return compiled, options[0], log.getvalue()


class _Source:
    """What Triton's cache wants of a source: its hash."""

    def __init__(self, digest: str) -> None:
        self.hash: Callable[[], str] = lambda: digest


def install(
    target: Any, *, name: str, source: str, options: dict[str, Any], metadata: dict[str, Any], code: bytes
) -> bool:
    """Put a binary into Triton's cache, where compiling the same for this target finds it.

    The address in Triton's cache depends on where Triton is installed, so it is computed here, not where it was compiled.

    Args:
        target: As Triton names it.
        name: The kernel's name.
        source: Triton's hash of its source, signature and constants.
        options: Triton's options.
        metadata: What Triton noted when it compiled.
        code: The binary.

    Returns:
        Whether it was not there before.
    """
    backend = make_backend(target)
    parsed = backend.parse_options({key: tuple(v) if isinstance(v, list) else v for key, v in options.items()})
    address = get_cache_key(_Source(source), backend, parsed, env_vars=get_cache_invalidating_env_vars())
    digest = hashlib.sha256(address.encode()).hexdigest()
    manager = get_cache_manager(digest)
    index, binary = (f"{name[:_NAME_LENGTH]}.{kind}" for kind in ("json", backend.binary_ext))
    if manager.get_group(index):
        return False
    metadata = {**metadata, "hash": digest, "extern_libs": parsed.extern_libs}
    files = {binary: manager.put(code, binary), index: manager.put(json.dumps(metadata), index, binary=False)}
    manager.put_group(index, files)
    return True
