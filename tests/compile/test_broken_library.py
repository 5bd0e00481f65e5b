"""Half a C++ library, as a compiler that was killed leaves it in Inductor's cache, is built again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY

pytestmark = [pytest.mark.compile, pytest.mark.nightly]

SCRIPT = """
import torch, esper_fx

x = torch.ones(4, 8)
model = esper_fx.morph(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()), sites="1", example_inputs=(x,))
torch.compile(model, backend="esper")(x).sum().backward()
print(model.stats().plans)
"""


def _run(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "ESPER_FX_STORE": "0",
        "ESPER_FX_WORKERS": "0",
    }
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300, check=True
    )


def test_half_a_library_is_built_again(tmp_path: Path) -> None:
    folder = tmp_path / "inductor"
    folder.mkdir(mode=0o700)
    assert "whole" in _run(folder).stdout
    libraries = list(folder.rglob("*.main.so"))
    assert libraries
    for library in libraries:
        library.write_bytes(library.read_bytes()[:0])
    second = _run(folder)
    assert "whole" in second.stdout, second.stderr
    assert "is broken and is built again" in second.stderr
    assert all(library.stat().st_size for library in libraries)
