"""Fresh processes for benchmarks: what they bring back, and that nothing of them stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks import child


def test_a_child_answers_with_its_json_and_its_times() -> None:
    answer = child.call("builtins:dict", {"a": [1, 2]}, environment={})
    assert answer["a"] == [1, 2]
    assert 0 <= answer["import_s"] <= answer["wall_s"]


def test_a_child_gets_the_environment_and_fresh_folders_vanish() -> None:
    with child.fresh_folders() as folders:
        paths = [Path(folder) for folder in folders.values()]
        assert set(folders) == {"ESPER_FX_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}
        assert all(path.is_dir() and not any(path.iterdir()) and path.stat().st_mode & 0o022 == 0 for path in paths)
        command = ["sh", "-c", "touch $ESPER_FX_CACHE_DIR/seen && echo told; exit 3"]
        with pytest.raises(RuntimeError, match=r"(?s)CalledProcessError.*non-zero exit status 3"):
            child.call("subprocess:run", {"args": command, "check": True}, environment=folders)
        assert [path.name for path in paths[0].iterdir()] == ["seen"]
    assert not any(path.exists() for path in paths)


def test_a_child_out_of_time_is_killed_with_all_it_started(tmp_path: Path) -> None:
    written = tmp_path / "pid"
    command = ["sh", "-c", f"echo $$ > {written}; exec sleep 60"]
    with pytest.raises(RuntimeError, match=r"no answer within 1\.5 s"):
        child.call("subprocess:run", {"args": command}, environment={}, timeout=1.5)
    grandchild = int(written.read_text())
    for _ in range(200):
        if not _is_running(grandchild):
            break
        time.sleep(0.02)
    assert not _is_running(grandchild)


def _is_running(pid: int) -> bool:
    """Whether the process exists and is not just waiting to be reaped by init."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
