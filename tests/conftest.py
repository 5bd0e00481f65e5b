"""Lanes, shared settings and hypothesis profiles of the test suite.

A test's lane is the folder it lies in: tests/fast, tests/processes, tests/property, tests/compile, tests/kernels, tests/gpu.
Nobody writes the marker.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():  # Triton decides when a kernel is defined, so before anything imports it
    os.environ.setdefault("TRITON_INTERPRET", "1")

import esper_fx

TESTS = Path(__file__).parent
LANES = ("compile", "kernels", "property", "processes", "fast", "gpu")

# derandomize: the same commit gives the same verdict. No deadline: nothing is timed in a test.
settings.register_profile("ci", max_examples=50, derandomize=True, deadline=None)
settings.register_profile(
    "nightly",
    max_examples=2_000,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("ci")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give every test its lane; leave out nightly tests unless asked for, and gpu tests where there is no GPU.

    What takes long starts first, and is dealt out among pytest-xdist's processes, each of which begins with a stretch of the
    list: so at the end no process waits for another.
    """
    for item in items:
        lane = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if lane in LANES:
            item.add_marker(lane)
        if "nightly" in item.keywords and "nightly" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="long: run with -m nightly"))
        if "gpu" in item.keywords and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="no GPU"))
    items.sort(key=lambda item: ("long" not in item.keywords, [not item.get_closest_marker(lane) for lane in LANES]))
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    items[:] = [item for first in range(processes) for item in items[first::processes]]


def _has_gpu() -> bool:
    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel store of this test session: never the user's own, and one for all of pytest-xdist's processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _session_settings(kernel_folder: Path) -> Iterator[None]:
    """One store for the whole session, so that a kernel is compiled once however many tests use it; a worker per process.

    nice 0: tests wait for their kernels, there is no training loop to be kind to.
    """
    with esper_fx.configure(cache_dir=kernel_folder, workers=1, worker_nice=0):
        yield


@pytest.fixture(scope="module", autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that compile nothing compute next to nothing: threads that wait for each other would only make them slow."""
    if not {"fast", "processes", "property"} & set(request.path.relative_to(TESTS).parts):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
