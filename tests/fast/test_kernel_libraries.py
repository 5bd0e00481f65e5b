"""The C++ libraries that come with a kernel: what lies in their place is used only if it is the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.standalone_compile import AOTCompiledArtifact

from esper_fx import _torch
from esper_fx.artifact import Artifact, pack

NAME = os.path.join("xy", "library.main.so")
CONTENT = b"what was verified"


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the library goes, in a cache folder of Inductor of its own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert cache_dir() == str(tmp_path)
    monkeypatch.setattr(AOTCompiledArtifact, "deserialize", staticmethod(lambda data: data))
    return tmp_path / NAME


def load() -> None:
    assert _torch.load_graph(pack(Artifact(b"kernel", {NAME: CONTENT}, [], {}))) == b"kernel"


@pytest.mark.parametrize("before", [None, b"", b"what was planted!", CONTENT + b" and more"])
def test_a_library_of_other_content_is_replaced(library: Path, before: bytes | None) -> None:
    if before is not None:
        library.parent.mkdir()
        library.write_bytes(before)
    load()
    assert library.read_bytes() == CONTENT
    assert [path.name for path in library.parent.iterdir()] == [library.name]


def test_a_library_of_the_same_content_stays(library: Path) -> None:
    load()
    before = library.stat()
    load()
    assert (library.stat().st_ino, library.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
