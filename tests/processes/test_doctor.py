"""The doctor's checks, each on a machine that is fine and on one where something is missing."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import esper_fx
from esper_fx import _torch
from esper_fx.commands import doctor, toolchain
from esper_fx.commands.doctor import Check, Status


def only(checks: Iterator[Check], name: str) -> Check:
    found = [check for check in checks if check.name == name]
    assert len(found) == 1
    return found[0]


def script(path: Path, body: str) -> str:
    """An executable that stands in for a compiler."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_python_and_torch_of_this_machine_are_accepted() -> None:
    assert only(doctor.check_python(), "Python").status is Status.OK
    assert only(doctor.check_torch(), "PyTorch").status is Status.OK


def test_an_old_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 9, "final", 0))
    check = only(doctor.check_python(), "Python")
    assert check.status is Status.FAIL
    assert "Python 3.11 or newer" in check.advice


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("2.9.1", Status.FAIL),
        ("2.10.1", Status.FAIL),
        ("2.11.0", Status.OK),
        ("2.13.0+cpu", Status.OK),
        ("3.0", Status.OK),
        ("1.13", Status.FAIL),
    ],
)
def test_torch_is_compared_by_number_not_by_text(version: str, status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda _: version)
    assert only(doctor.check_torch(), "PyTorch").status is status


def test_no_compiler_fails_and_names_the_way_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(_torch, "cpp_compiler", missing)
    (check,) = doctor.check_compiler()
    assert (check.name, check.status) == ("C++ compiler", Status.FAIL)
    assert "install one" in check.advice
    assert "CXX" in check.advice


def test_a_compiler_that_reports_an_error_fails_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = script(tmp_path / "broken", 'echo "note: on the way" >&2; echo "fatal error: out of ink" >&2; exit 1')
    monkeypatch.setattr(_torch, "cpp_compiler", lambda: compiler)
    (check,) = doctor.check_compiler()
    assert check.status is Status.FAIL
    assert check.found == f"{compiler}: fatal error: out of ink"


def test_a_compiler_whose_programs_print_nonsense_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = 'while [ "$1" != "-o" ]; do shift; done; printf "#!/bin/sh\\necho 3.000" > "$2"; chmod +x "$2"'
    monkeypatch.setattr(_torch, "cpp_compiler", lambda: script(tmp_path / "liar", program))
    (check,) = doctor.check_compiler()
    assert check.status is Status.FAIL
    assert "printed '3.000', expected '2.000'" in check.found


def test_missing_python_headers_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _needs_compiler()
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    check = only(doctor.check_compiler(), "Python headers")
    assert check.status is Status.FAIL
    assert "Python.h" in check.found
    assert "dev" in check.advice


def test_the_compiler_of_this_machine_passes() -> None:
    _needs_compiler()
    assert {check.name: check.status for check in doctor.check_compiler()} == {
        "C++ compiler": Status.OK,
        "OpenMP": Status.OK,
        "Python headers": Status.OK,
    }


def test_a_program_that_does_not_end_is_a_problem_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_TIMEOUT_S", 0.2)
    output, problem = toolchain.build_and_run(script(tmp_path / "slow", "exec sleep 60"), "", [])
    assert output == ""
    assert problem is not None
    assert problem.startswith("TimeoutExpired")


def test_a_private_store_passes_and_one_that_others_can_write_to_fails(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir(mode=0o700)
    with esper_fx.configure(cache_dir=folder):
        check = only(doctor.check_cache_folder(), "kernel store")
        assert check.status is Status.OK
        assert check.found == f"{folder}: 0 kernels, 0.0 MB"
        folder.chmod(0o777)
        check = only(doctor.check_cache_folder(), "kernel store")
        assert check.status is Status.FAIL
        assert "writable by others" in check.found
        assert "ESPER_FX_CACHE_DIR" in check.advice


def test_a_store_that_is_switched_off_is_worth_a_look(tmp_path: Path) -> None:
    with esper_fx.configure(cache_dir=tmp_path / "never", store=False):
        assert only(doctor.check_cache_folder(), "kernel store").status is Status.WARN
    assert not (tmp_path / "never").exists()


def test_a_full_disk_is_worth_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=5_000_000))
    with esper_fx.configure(cache_dir=tmp_path / "kernels"):
        check = only(doctor.check_cache_folder(), "kernel store")
    assert check.status is Status.WARN
    assert check.found.endswith("only 5 MB left on that disk")


def test_a_worker_answers_from_a_process_of_its_own() -> None:
    check = only(doctor.check_worker(), "compile worker")
    assert check.status is Status.OK
    assert f"process {os.getpid()} " not in check.found


def test_a_job_in_the_same_process_is_no_answer() -> None:
    with pytest.raises(RuntimeError, match="in the process that asked"):
        doctor.answer(str(os.getpid()).encode())


def test_a_worker_that_cannot_start_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "answer", None)  # the worker imports the module anew; only its name is used here
    monkeypatch.setattr(doctor, "__name__", "esper_fx.nowhere")
    check = only(doctor.check_worker(), "compile worker")
    assert check.status is Status.FAIL
    assert "esper_fx.nowhere" in check.found


def test_a_check_that_breaks_is_reported_and_the_others_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_torch() -> Iterator[Check]:
        raise ZeroDivisionError("whoops")
        yield

    for name in ("check_compiler", "check_worker"):
        monkeypatch.setattr(doctor, name, lambda: iter(()))
    for function in (doctor.check_compiler, doctor.check_worker):
        function.__name__ = "check_nothing"
    monkeypatch.setattr(doctor, "check_torch", check_torch)
    checks = {check.name: check for check in doctor.diagnose()}
    assert checks["torch"].found == "ZeroDivisionError: whoops"
    assert checks["torch"].status is Status.FAIL
    assert {"Python", "demo"} <= set(checks)


def _needs_compiler() -> None:
    try:
        _torch.cpp_compiler()
    except RuntimeError:
        pytest.skip("no C++ compiler")
