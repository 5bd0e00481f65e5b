"""Child interpreters and waiting, for tests of what happens between processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

# esper_fx itself imports torch, which takes seconds. A script that is about the cache alone can do without.
WITHOUT_TORCH = """
import importlib.util, sys, types
sys.modules["esper_fx"] = types.ModuleType("esper_fx")
sys.modules["esper_fx"].__path__ = [{package!r}]
"""


def start_script(path: Path, source: str, *arguments: object) -> subprocess.Popen[str]:
    """Starts a script in an interpreter of its own, with the repository on its path and both streams captured.

    ``import esper_fx`` in the script gives the package without its top-level names, and so without torch.
    """
    path.write_text(WITHOUT_TORCH.format(package=str(REPOSITORY / "esper_fx")) + textwrap.dedent(source))
    return subprocess.Popen(
        [sys.executable, str(path), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def finish(process: subprocess.Popen[str], timeout: float = 30.0) -> str:
    """Waits for a script; returns its output, or fails with its errors."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        raise AssertionError(f"the script hangs; so far it printed:\n{output}{errors}") from None
    assert process.returncode == 0, errors
    assert errors == ""
    return output


def in_forked_child(check: Callable[[], object]) -> bool:
    """Runs ``check`` in a forked child; returns whether it passed there, that is, neither raised nor hung."""
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            check()
            status = 0
        os._exit(status)
    ended: list[int] = []

    def has_ended() -> bool:
        if not ended and (result := os.waitpid(pid, os.WNOHANG))[0]:
            ended.append(result[1])
        return bool(ended)

    if not eventually(has_ended):
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        return False
    return ended[0] == 0


def is_running(pid: int) -> bool:
    """Whether a process lives; one that has ended and waits to be reaped does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return True


def eventually(condition: Callable[[], object], timeout: float = 15.0) -> bool:
    """Waits until a condition holds; returns whether it came to hold. The timeout is for tests that fail only."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
