"""The command line: what it offers, how it fails, and what it exits with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esper_fx import cli
from esper_fx.commands import doctor
from esper_fx.demo import plot, run
from esper_fx.demo.task import DemoError
from esper_fx.errors import KernelBuildError

runner = CliRunner()


def test_help_names_every_command() -> None:
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    assert "demo" in result.output
    assert "doctor" in result.output


def test_version_names_both_packages() -> None:
    result = runner.invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("esper-fx 0.")
    assert "torch 2." in result.output


def test_help_is_quick_because_it_imports_no_torch() -> None:
    program = (
        "import sys, esper_fx.cli as cli\n"
        "loaded = 'torch' in sys.modules\n"
        "print(loaded == ('torch' in sys.modules))\n"
        "print(any(name.startswith('esper_fx.demo') for name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize("arguments", [["--steps", "99"], ["--steps", "many"], ["--seed", "-1"], ["--nonsense"]])
def test_wrong_options_are_refused_before_anything_runs(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "run_demo", lambda *_, **__: pytest.fail("the demo ran"))
    assert runner.invoke(cli.app, ["demo", *arguments]).exit_code == 2


def test_demo_hands_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(run, "run_demo", lambda _, **options: calls.append(options))
    runner.invoke(cli.app, ["demo"])
    runner.invoke(
        cli.app, ["demo", "--text", "--steps", "300", "--seed", "3", "--output", str(tmp_path), "--no-control"]
    )
    runner.invoke(cli.app, ["demo", "--no-plot"])
    assert calls == [
        {"text": False, "steps": None, "seed": 0, "output": Path("demo-output"), "control": True},
        {"text": True, "steps": 300, "seed": 3, "output": tmp_path, "control": False},
        {"text": False, "steps": None, "seed": 0, "output": None, "control": True},
    ]


@pytest.mark.parametrize("error", [DemoError("no digits [today]"), KernelBuildError("no digits [today]")])
def test_demo_fails_with_a_sentence_and_no_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(run, "run_demo", fail)
    result = runner.invoke(cli.app, ["demo"])
    assert result.exit_code == 1
    assert result.output == "esper-fx demo: no digits [today]\n"


def test_demo_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = runner.invoke(cli.app, ["demo", "--no-plot"])
    assert result.exit_code == 1
    assert 'pip install "esper-fx[demo]"' in result.output


def test_demo_without_matplotlib_says_so_before_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda _: None)
    result = runner.invoke(cli.app, ["demo"])
    assert result.exit_code == 1
    assert 'pip install "esper-fx[demo]", or run with --no-plot' in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("statuses", "code", "verdict"),
    [
        ([], 0, "Everything that esper_fx needs is here."),
        ([doctor.Status.WARN], 0, "0 failed, 1 to look at. esper_fx will work."),
        ([doctor.Status.WARN, doctor.Status.FAIL], 1, "1 failed, 1 to look at."),
    ],
)
def test_doctor_exits_with_one_where_something_failed(
    statuses: list[doctor.Status], code: int, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diagnose() -> Iterator[doctor.Check]:
        yield doctor.Check("sky", doctor.Status.OK, "blue")
        for status in statuses:
            yield doctor.Check("weather", status, "[rain]", "take an umbrella")

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    result = runner.invoke(cli.app, ["doctor"])
    assert result.exit_code == code
    assert result.output.rstrip().endswith(verdict)
    assert ("take an umbrella" in result.output) == bool(statuses)
    assert ("[rain]" in result.output) == bool(statuses)
