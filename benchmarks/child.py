"""Runs one function in a fresh Python process and brings back its JSON: for what happens once in a process's life.

Only the standard library is imported here, so that a child can time the import of everything else.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"esper_fx": "ESPER_FX_CACHE_DIR", "inductor": "TORCHINDUCTOR_CACHE_DIR"}


@contextmanager
def fresh_folders(filled_like: Mapping[str, str] | None = None) -> Iterator[dict[str, str]]:
    """Environment variables that point our store and Inductor's own cache to new folders, removed at the end.

    Args:
        filled_like: What this yielded before: the new folders begin as copies of those. Default: they are empty.
    """
    folder = Path(tempfile.mkdtemp(prefix="esper-fx-bench-"))
    try:
        environment = {}
        for name, variable in FOLDERS.items():
            path = folder / name
            path.mkdir(mode=0o700)
            if filled_like is not None:
                shutil.copytree(filled_like[variable], path, symlinks=True, dirs_exist_ok=True)
            environment[variable] = str(path)
        yield environment
    finally:
        _remove(folder)


def _remove(folder: Path, patience_s: float = 5.0) -> None:
    """Remove a folder that a worker of a child just ended may still be writing to."""
    deadline = perf_counter() + patience_s
    while folder.exists() and perf_counter() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        sleep(0.05)


def call(
    target: str, arguments: Mapping[str, Any], *, environment: Mapping[str, str], timeout: float = 600.0
) -> dict[str, Any]:
    """Call ``target`` in a fresh process.

    Args:
        target: ``"package.module:function"``; the function returns a dict that JSON can carry.
        arguments: Its keyword arguments, JSON-able.
        environment: Added to this process's environment.
        timeout: Seconds after which the child and whatever it started are killed.

    Returns:
        What the function returned, with ``import_s`` (seconds to import the target's module) and ``wall_s`` (seconds
        of the whole process, start and end included) added.

    Raises:
        RuntimeError: If the child failed or ran out of time; the message ends with the last lines it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="esper-fx-bench-") as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.child", target, json.dumps(dict(arguments)), str(answer)]
        started = perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | dict(environment),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | str = process.wait(timeout)
            except subprocess.TimeoutExpired:
                status = f"no answer within {timeout:g} s"
            finally:
                # Also after an interrupt: the child leads its own group, which Ctrl-C does not reach.
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        wall_s = perf_counter() - started
        if status != 0 or not answer.exists():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
            raise RuntimeError(f"{target}({dict(arguments)}) failed in its process: {status}\n{tail}")
        return json.loads(answer.read_text()) | {"wall_s": wall_s}


def main(target: str, arguments: str, answer: str) -> None:
    """Run in the child: import, call, write the answer."""
    module, _, function = target.partition(":")
    started = perf_counter()
    imported = importlib.import_module(module)
    import_s = perf_counter() - started
    result = getattr(imported, function)(**json.loads(arguments))
    Path(answer).write_text(json.dumps(dict(result) | {"import_s": import_s}))


if __name__ == "__main__":
    main(*sys.argv[1:])
