"""Kernels compiled ahead of time, for GPUs that are not here, and loaded on one without compiling."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from esper_fx import ArtifactStore
from esper_fx.kernels import build_cases
from esper_fx.kernels.prebuilt import unpack
from esper_fx.prebuilt import KIND
from tests.support.processes import eventually, is_running

ROOT = Path(__file__).parents[2]
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
LOW_RANK = ("forward_kernel", "backward_rows_kernel", "backward_weights_kernel", "sum_kernel")


class Build(NamedTuple):
    """A build of a few kernels for all targets."""

    folder: Path
    rows: list[dict[str, Any]]


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a module of the tests in a process where kernels are compiled, not interpreted."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
    )


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("prebuilt") / "store"
    done = run(["tests.support.kernel_builds", ",".join(TARGETS), str(folder)])
    assert done.returncode == 0, done.stderr
    return Build(folder, json.loads(done.stdout))


def stored(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """Target, kernel and data of what the build stored."""
    store = ArtifactStore(folder)
    for manifest in store.entries():
        data = store.get(manifest.key)
        assert data is not None
        assert manifest.metadata["kind"] == KIND
        yield str(manifest.metadata["target"]), str(manifest.metadata["kernel"]), data


def test_every_kernel_fits_every_target_and_spills_nothing(build: Build) -> None:
    assert [(row["target"], row["kernel"], row["problems"]) for row in build.rows if row["problems"]] == []
    assert {row["target"] for row in build.rows if row["kernel"] == "low_rank.forward_kernel"} == set(TARGETS)
    for row in build.rows:
        assert row["default"]
        assert row["spilled"] == 0
        assert 0 < row["registers"] <= (512 if row["target"].startswith("hip") else 255)
        assert row["nbytes"] > 1000


def test_the_binaries_are_what_such_a_gpu_loads(build: Build) -> None:
    found = Counter()
    for target, kernel, data in stored(build.folder):
        found[target] += 1
        for binary in unpack(data):
            assert kernel.endswith(f".{binary.name}")
            assert binary.code.startswith(b"\x7fELF")
            machine = int.from_bytes(binary.code[18:20], "little")
            assert machine == (224 if target.startswith("hip") else 190)  # EM_AMDGPU, EM_CUDA
    kernels = {target: {row["kernel"] for row in build.rows if row["target"] == target} for target in TARGETS}
    assert found == {target: len(names) for target, names in kernels.items()}
    assert kernels["cuda:90"] - kernels["hip:gfx942"] == {"low_rank_rows.rows_kernel"}  # Gluon's, for NVIDIA's GPUs


def test_no_path_of_the_building_machine_is_stored(build: Build) -> None:
    package = importlib.util.find_spec("triton")
    assert package is not None
    assert package.submodule_search_locations
    folder = package.submodule_search_locations[0].encode()
    for _, _, data in stored(build.folder):
        index = json.dumps([{**vars(binary), "code": ""} for binary in unpack(data)])
        assert folder not in index.encode()


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_a_gpu_loads_them_without_compiling(build: Build, target: str, tmp_path: Path) -> None:
    # Triton lies elsewhere than where they were built, as on another machine.
    package = importlib.util.find_spec("triton")
    assert package is not None
    assert package.submodule_search_locations
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "triton").symlink_to(package.submodule_search_locations[0])
    path = os.pathsep.join(filter(None, [str(tmp_path / "elsewhere"), os.environ.get("PYTHONPATH")]))
    done = run(
        ["tests.support.pretend_gpu", target],
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
        ESPER_FX_CACHE_DIR=str(build.folder),
        PYTHONPATH=path,
    )
    assert done.returncode == 0, done.stderr
    launched = json.loads(done.stdout)
    assert [name for name, _ in launched] == 2 * list(LOW_RANK)
    codes = {
        sha256(binary.code).hexdigest()
        for where, _, data in stored(build.folder)
        if where == target
        for binary in unpack(data)
    }
    assert {code for _, code in launched} <= codes


def test_without_them_it_would_compile(tmp_path: Path) -> None:
    done = run(
        ["tests.support.pretend_gpu", "cuda:90"],
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
        ESPER_FX_CACHE_DIR=str(tmp_path / "store"),
    )
    assert done.returncode == 1
    assert "forward_kernel is being compiled" in done.stderr
    assert not (tmp_path / "store").exists()


def test_a_file_s_example_calls_are_told_apart() -> None:
    labels = Counter((case.call.__module__, case.dtype, case.label) for case in build_cases.build_cases())
    assert [label for label, count in labels.items() if count > 1] == []


def test_example_calls_launch_and_nothing_runs() -> None:
    cases = list(build_cases.build_cases())
    launches = [[launch.kernel.fn.__name__ for launch in case.launches()] for case in cases]
    assert all(launches)
    for case, names in zip(cases, launches, strict=True):
        if case.call.__module__.endswith(".low_rank_rows"):
            assert names == ["rows_kernel", "rows_kernel"]
        elif case.call.__module__.endswith(".low_rank"):
            assert names == (["forward_kernel", "merge_kernel"] if "statistics" in case.label else list(LOW_RANK))


def test_kernels_that_do_not_compile_or_crash_the_compiler_are_told_and_the_others_built() -> None:
    done = run(["tests.support.tiny_kernels"])
    assert done.returncode == 0, done.stderr
    problems, built = zip(*json.loads(done.stdout), strict=True)
    assert built == (True, False, False, True, False, True)
    assert [problem for problem, good in zip(problems, built, strict=True) if good] == [None] * 3
    assert problems[1] == problems[4] == "the compiler crashed: LLVM ERROR: out of luck"
    assert problems[2] == "CompilationError: Shape element 0 must be a power of 2"
    assert "out of luck" not in done.stderr


def test_processes_that_compile_end_with_the_one_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "build.py"
    script.write_text(
        "import multiprocessing, os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from esper_fx.kernels.build import _begin\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    with ProcessPoolExecutor(1, context, initializer=_begin, initargs=('.',)) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        compiling = int(process.stdout.readline())
        assert is_running(compiling)
        process.kill()
    assert eventually(lambda: not is_running(compiling))
