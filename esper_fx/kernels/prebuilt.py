"""Binaries of a kernel that were compiled ahead of time, as bytes, and their way into Triton's cache."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

_INDEX = "index.json"


@dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    Attributes:
        name: The kernel's name.
        source: Triton's hash of its source, the signature and the constants that it was compiled for.
        options: Triton's options that it was compiled with, without paths.
        metadata: What Triton noted when it compiled it, without paths.
        code: What the driver loads.
    """

    name: str
    source: str
    options: dict[str, Any]
    metadata: dict[str, Any]
    code: bytes


def pack(binaries: Iterable[Binary]) -> bytes:
    """Binaries as bytes, each once."""
    unique = {(binary.source, json.dumps(binary.options, sort_keys=True)): binary for binary in binaries}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # not compressed: on its way to a launch, reading counts
        described = [{**asdict(binary), "code": f"{number}.bin"} for number, binary in enumerate(unique.values())]
        archive.writestr(_INDEX, json.dumps(described))
        for number, binary in enumerate(unique.values()):
            archive.writestr(f"{number}.bin", binary.code)
    return buffer.getvalue()


def unpack(data: bytes) -> list[Binary]:
    """What :func:`pack` packed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [Binary(**{**each, "code": archive.read(each["code"])}) for each in json.loads(archive.read(_INDEX))]


def install(data: bytes, target: Any) -> int:
    """Put packed binaries into Triton's cache, where launches on a device of this kind find them.

    Args:
        data: What :func:`pack` returned.
        target: As Triton names it.

    Returns:
        How many were not there before.
    """
    from esper_fx.kernels import _triton

    return sum(_triton.install(target, **vars(binary)) for binary in unpack(data))
