"""Jobs that the tests of the kernel compiler run in worker processes: each maps bytes to bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


class WorkshopFireError(Exception):
    """An exception type that only the worker knows."""


def echo(payload: bytes) -> bytes:
    """Returns its payload."""
    return payload


def doubled(payload: bytes) -> bytes:
    """Returns its payload twice: a "compilation" whose result differs from its input."""
    return payload + payload


def describe(payload: bytes) -> bytes:
    """Returns facts about the worker, as JSON; sets the environment variable named in the payload, if any."""
    facts = {
        "pid": os.getpid(),
        "session": os.getsid(0),
        "nice": os.nice(0),
        "cwd": os.getcwd(),
        "path": sys.path,
        "environment": dict(os.environ),
        "torch": "torch" in sys.modules,
    }
    if payload:
        os.environ[payload.decode()] = "set"
    return json.dumps(facts).encode()


def warm(payload: bytes) -> bytes:
    """Marks the worker as warm, for ``describe`` to see."""
    os.environ["WARMED_WITH"] = repr(payload)
    return b""


def fail(payload: bytes) -> bytes:
    """Raises an error of this module."""
    raise WorkshopFireError(payload.decode())


def exit_interpreter(payload: bytes) -> bytes:
    """Calls sys.exit, as a careless compiler might."""
    sys.exit(3)


def returns_text(payload: bytes) -> str:
    """Returns the wrong type."""
    return payload.decode()


def noise(payload: bytes) -> bytes:
    """Writes to stdout in every way there is, more than a pipe holds."""
    print("from print" * 20_000)
    sys.stdout.flush()
    os.write(1, b"from descriptor 1\n")
    subprocess.run([sys.executable, "-S", "-c", "print('from a child')"], check=True)
    return payload


def kill_worker(payload: bytes) -> bytes:
    """Dies as by the kernel's out-of-memory killer; adds a line to the file named in the payload first."""
    with open(payload.decode(), "a") as file:
        file.write(f"{os.getpid()}\n")
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return b""


def kill_worker_once(payload: bytes) -> bytes:
    """Dies the first time; afterwards returns the process id."""
    marker = Path(payload.decode())
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return str(os.getpid()).encode()


def kill_worker_beside_child(payload: bytes) -> bytes:
    """Dies while a forked child, which has all its descriptors, lives on; writes the child's pid to a file."""
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    Path(payload.decode()).write_text(str(child))
    os.kill(os.getpid(), signal.SIGKILL)
    return b""


def hang(payload: bytes) -> bytes:
    """Starts a child and waits for it for a minute; writes the process ids of both to the file named in the payload."""
    child = subprocess.Popen(["sleep", "60"])
    path = Path(payload.decode())
    temporary = path.with_suffix(".partial")
    temporary.write_text(f"{os.getpid()} {child.pid}")
    temporary.replace(path)
    child.wait()
    return b""


def wait_for_file(payload: bytes) -> bytes:
    """Returns when the file named in the payload exists."""
    while not Path(payload.decode()).exists():
        time.sleep(0.005)
    return b""


def append(payload: bytes) -> bytes:
    """Adds a line to a file: payload ``path|line``."""
    path, line = payload.decode().split("|")
    with open(path, "a") as file:
        file.write(line + "\n")
    return b""


def burn(payload: bytes) -> bytes:
    """Uses CPU time, half of it in a child: about 0.1 s each."""
    code = "import time\nwhile time.process_time() < 0.1: pass"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)
    started = time.process_time()
    while time.process_time() - started < 0.1:
        pass
    return b""
