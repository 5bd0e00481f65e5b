"""What of a compiled graph is stored: a zip archive of what PyTorch serialised and of all that loading would make anew."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import marshal
import os
import sys
import threading
import types
import zipfile
from dataclasses import dataclass, field

from esper_fx.kernels.launch import HiddenLaunch

#: Python's code objects go to the same version only: another one reads them otherwise.
_CODE = f"code-{sys.implementation.cache_tag}-{importlib.util.MAGIC_NUMBER.hex()}"

Code = dict[bytes, types.CodeType]
"""Compiled Python by the SHA-256 of its source and of how it was compiled."""


@dataclass(frozen=True)
class Artifact:
    """A compiled graph as it is stored.

    Attributes:
        serialized: What PyTorch made of it.
        libraries: C++ libraries that it calls, by their path in Inductor's cache folder.
        hidden: What launches within operators will compile.
        code: The Python that PyTorch has generated for it, compiled.
        guards: What has to be true of its integer inputs for it to be right, where sizes vary; None where they are fixed.
    """

    serialized: bytes
    libraries: dict[str, bytes] = field(default_factory=dict)
    hidden: list[HiddenLaunch] = field(default_factory=list)
    code: Code = field(default_factory=dict)
    guards: tuple[str, ...] | None = None


def pack(artifact: Artifact) -> bytes:
    """The archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("artifact", artifact.serialized)
        archive.writestr("launches", json.dumps([dataclasses.asdict(launch) for launch in artifact.hidden]))
        if artifact.guards is not None:
            archive.writestr("guards", json.dumps(artifact.guards))
        archive.writestr(_CODE, marshal.dumps(artifact.code))
        for name, content in artifact.libraries.items():
            archive.writestr(f"library/{name}", content)
    return buffer.getvalue()


def unpack(data: bytes) -> Artifact:
    """What :func:`pack` packed; without code where another version of Python did."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [name for name in archive.namelist() if name.startswith("library/")]
        return Artifact(
            archive.read("artifact"),
            {name.removeprefix("library/"): archive.read(name) for name in names},
            [HiddenLaunch(**each) for each in json.loads(archive.read("launches"))],
            marshal.loads(archive.read(_CODE)) if _CODE in archive.namelist() else {},
            tuple(json.loads(archive.read("guards"))) if "guards" in archive.namelist() else None,
        )


def relocated(code: types.CodeType, path: str) -> types.CodeType:
    """The same code in another file, for tracebacks and for whoever asks where a function comes from."""
    if code.co_filename == path:
        return code
    constants = [relocated(value, path) if isinstance(value, types.CodeType) else value for value in code.co_consts]
    return code.replace(co_filename=path, co_consts=tuple(constants))


def holds(path: str, content: bytes) -> bool:
    """Whether a file is there, can be read, and has this content."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size == len(content) and file.read() == content
    except OSError:
        return False


def write_atomic(path: str, content: bytes) -> None:
    """Write a file so that whoever reads it meanwhile finds all of it or nothing."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.tmp"
    with open(temporary, "wb") as file:
        file.write(content)
    os.replace(temporary, path)
