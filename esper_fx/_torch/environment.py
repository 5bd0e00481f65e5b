"""What compiled code depends on besides its graph."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from functools import cache
from typing import Any

import torch

from esper_fx import flags


def compile_environment() -> dict[str, str]:
    """What compiled code depends on besides the graph: versions, processor, accelerator and PyTorch's global flags.

    And where PyTorch lies: Inductor finds a C++ library by a compiler command that names the folder. From another one it would
    be built anew while it is loaded, in the process that trains.
    """
    device = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "triton": _version_of("triton"),
        "folder": os.path.dirname(torch.__file__),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()} {_processor()}",
        "gpu": "" if device is None else f"{device.name} {device.major}.{device.minor}",
        **flags.current(),
    }


#: What identifies a processor in /proc/cpuinfo, on x86 and on Arm.
_PROCESSOR_LINES = ("model name", "flags", "CPU implementer", "CPU part", "CPU variant", "Features")


@cache
def _processor() -> str:
    """A digest of what the system says of the processor: C++ is compiled for exactly this one."""
    described = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        first = file.read().split("\n\n", 1)[0].splitlines()
        described = "\n".join(line for line in first if line.split("\t")[0].strip() in _PROCESSOR_LINES)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def inductor_settings() -> dict[str, Any]:
    """The user's Inductor configuration: whatever differs in it gives other code. Only what can be sent to a worker."""
    import torch._inductor.config as inductor_config

    settings = inductor_config.save_config_portable()
    for name in ("compile_threads", "worker_start_method", "unsafe_marked_cacheable_functions"):
        settings.pop(name, None)
    return {name: value for name, value in sorted(settings.items()) if _is_plain(value)}


def inductor_patch(settings: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """Apply settings from another process to Inductor here."""
    import torch._inductor.config as inductor_config

    known = {
        name: value for name, value in settings.items() if inductor_config.save_config_portable().get(name) != value
    }
    return inductor_config.patch(known) if known else contextlib.nullcontext()


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _version_of(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
