"""Builds tiny C++ programs with the compiler that Inductor would use, the way Inductor would. For the doctor."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

_TIMEOUT_S = 120

PROGRAM = """\
#include <cmath>
#include <cstdio>
#include <vector>

int main() {
    std::vector<double> terms;
    for (int i = 0; i < 20; ++i) terms.push_back(std::pow(0.5, i));
    double sum = 0;
    for (double term : terms) sum += term;
    return std::printf("%.3f", sum) > 0 ? 0 : 1;
}
"""
PROGRAM_SAYS = "2.000"

OPENMP_PROGRAM = """\
#include <cstdio>
#include <omp.h>

int main() {
    int threads = 0;
#pragma omp parallel num_threads(2) reduction(+ : threads)
    threads += 1;
    return std::printf("%d of %d", threads, omp_get_num_procs()) > 0 ? 0 : 1;
}
"""

HEADERS_PROGRAM = """\
#include <Python.h>

int main() { return PY_MAJOR_VERSION == 3 ? 0 : 1; }
"""


def build_and_run(compiler: str, source: str, flags: list[str], *, link: bool = True) -> tuple[str, str | None]:
    """Compile a source with the compiler and, unless `link` is off, run the program.

    Returns:
        What the program printed, and the problem, None if there was none.
    """
    with tempfile.TemporaryDirectory(prefix="esper-fx-doctor-") as folder:
        file, program = Path(folder, "check.cpp"), Path(folder, "check.exe" if link else "check.o")
        file.write_text(source)
        command = [compiler, "-std=c++17", *([] if link else ["-c"]), str(file), "-o", str(program), *flags]
        for action in [command, [str(program)]] if link else [command]:
            try:
                done = subprocess.run(action, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                return "", f"{type(error).__name__}: {error}"
            if done.returncode != 0:
                return "", _first_error(done.stderr) or f"{Path(action[0]).name} ended with status {done.returncode}"
    return done.stdout.strip(), None


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines if "error" in line.lower()]
    return (wrong or lines or [""])[0]


def describe(compiler: str) -> str:
    """The compiler's name and version, as it states them."""
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return compiler
    return done.stdout.splitlines()[0] if done.stdout else compiler


def openmp_flags() -> list[str]:
    """What compiles and links OpenMP here; on macOS it is not part of the compiler."""
    if sys.platform != "darwin":
        return ["-fopenmp"]
    prefix = os.environ.get("OMP_PREFIX", "/opt/homebrew/opt/libomp")
    return ["-Xclang", "-fopenmp", "-I", f"{prefix}/include", "-L", f"{prefix}/lib", "-lomp"]


def how_to_get_one() -> str:
    """How a C++ compiler is installed here."""
    if sys.platform == "darwin":
        return "install one: xcode-select --install"
    return "install one: on Debian and Ubuntu apt install g++, on Fedora dnf install gcc-c++"
