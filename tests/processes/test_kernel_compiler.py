"""KernelCompiler: jobs run in processes of their own, whatever becomes of those, and none is left behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

from esper_fx.cache import Job, JobResult, KernelCompiler
from esper_fx.errors import KernelBuildError, SettingsError
from tests.support.processes import eventually, finish, in_forked_child, is_running, start_script

JOBS = "tests.support.cache_jobs"


@pytest.fixture(scope="module")
def compiler() -> Any:
    """For tests after which the worker is as good as new."""
    with KernelCompiler(nice=3, threads=2, environment={"FROM_TEST": "yes"}, warm=f"{JOBS}:warm") as compiler:
        yield compiler


def run(compiler: KernelCompiler, name: str, payload: bytes = b"", priority: int = 0) -> Future[JobResult]:
    return compiler.submit(Job(f"{JOBS}:{name}", payload, priority))


def pids_in(path: Path, count: int = 1) -> list[int]:
    """Waits for process ids that a job writes to a file."""
    assert eventually(lambda: path.exists() and len(path.read_text().split()) >= count)
    return [int(pid) for pid in path.read_text().split()]


def error_of(future: Future[JobResult]) -> KernelBuildError:
    error = future.exception(timeout=20)
    assert isinstance(error, KernelBuildError)
    return error


class TestJobs:
    @pytest.mark.parametrize("size", [0, 1, 3 << 20])
    def test_bytes_go_there_and_come_back(self, compiler: KernelCompiler, size: int) -> None:
        payload = os.urandom(size)
        assert run(compiler, "doubled", payload).result(timeout=20).data == payload * 2

    def test_one_worker_serves_many_jobs(self, compiler: KernelCompiler) -> None:
        futures = [run(compiler, "echo", str(number).encode()) for number in range(200)]
        assert [int(future.result(timeout=20).data) for future in futures] == list(range(200))
        assert compiler.stats().workers_started == 1

    def test_time_is_measured_in_the_worker_with_its_children(self, compiler: KernelCompiler) -> None:
        result = run(compiler, "burn").result(timeout=20)
        assert result.cpu_seconds >= 0.18  # 0.1 s here and 0.1 s in a child, in ticks of 0.01 s
        assert result.seconds > 0.0
        before = compiler.stats()
        run(compiler, "burn").result(timeout=20)
        assert eventually(lambda: compiler.stats().completed == before.completed + 1)
        assert compiler.stats().cpu_seconds_total >= before.cpu_seconds_total + 0.18

    def test_the_worker_is_set_up_as_asked(self, compiler: KernelCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend("/somewhere/new")
        facts = json.loads(run(compiler, "describe").result(timeout=20).data)
        assert facts["pid"] == facts["session"] != os.getpid()  # Ctrl-C in a terminal goes to a session
        assert facts["nice"] == min(19, os.nice(0) + 3)
        assert facts["environment"]["FROM_TEST"] == "yes"
        assert facts["environment"]["OMP_NUM_THREADS"] == facts["environment"]["MKL_NUM_THREADS"] == "2"
        assert facts["environment"]["WARMED_WITH"] == "b''"
        assert facts["cwd"] == os.getcwd()
        assert facts["path"] == [os.path.abspath(entry) if os.path.exists(entry) else entry for entry in sys.path]
        assert not facts["torch"]

    def test_what_a_job_prints_does_not_reach_the_protocol_or_the_terminal(
        self, compiler: KernelCompiler, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.DEBUG, logger="esper_fx"):
            assert run(compiler, "noise", b"signal").result(timeout=20).data == b"signal"
        assert capfd.readouterr() == ("", "")
        assert "from descriptor 1\nfrom a child" in caplog.text
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="esper_fx"):
            assert run(compiler, "echo", b"next").result(timeout=20).data == b"next"
        assert not caplog.records  # each job's output is its own

    def test_an_exception_comes_back_with_its_type_and_traceback(self, compiler: KernelCompiler) -> None:
        error = error_of(run(compiler, "fail", b"the anvil is cold"))
        assert str(error) == f"job {JOBS}:fail failed in its worker: {JOBS}.WorkshopFireError: the anvil is cold"
        assert error.worker_traceback is not None
        assert "in fail\n    raise WorkshopFireError(payload.decode())" in error.worker_traceback
        assert run(compiler, "echo", b"next").result(timeout=20).data == b"next"
        assert compiler.stats().workers_started == 1

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (f"{JOBS}:exit_interpreter", "SystemExit: 3"),
            (
                f"{JOBS}:returns_text",
                f"TypeError: job {JOBS}:returns_text returned a str, expected bytes",
            ),
            (f"{JOBS}:no_such_job", f"AttributeError: module '{JOBS}' has no attribute 'no_such_job'"),
            ("no_such_module:job", "ModuleNotFoundError: No module named 'no_such_module'"),
        ],
    )
    def test_a_bad_job_does_not_end_its_worker(self, compiler: KernelCompiler, target: str, message: str) -> None:
        error = error_of(compiler.submit(Job(target, b"")))
        assert str(error).endswith(f"failed in its worker: {message}")
        assert run(compiler, "echo", b"next").result(timeout=20).data == b"next"
        assert compiler.stats().workers_started == 1

    def test_callbacks_may_submit(self, compiler: KernelCompiler) -> None:
        second: Future[Future[JobResult]] = Future()
        run(compiler, "echo").add_done_callback(lambda _: second.set_result(run(compiler, "echo", b"two")))
        assert second.result(timeout=20).result(timeout=20).data == b"two"


class TestQueue:
    def test_urgent_jobs_first_then_first_come(self, tmp_path: Path) -> None:
        with KernelCompiler(nice=0) as compiler:
            go = tmp_path / "go"
            blocker = run(compiler, "wait_for_file", str(go).encode(), priority=9)
            assert eventually(lambda: compiler.stats().running == 1)
            order = [3, 1, 2, 1, 3, 0, -1, 2]
            futures = [
                run(compiler, "append", f"{tmp_path / 'log'}|{priority}{number}".encode(), priority)
                for number, priority in enumerate(order)
            ]
            assert compiler.stats().pending == len(order)
            cancelled = futures.pop(1)
            assert cancelled.cancel()
            assert not blocker.cancel()
            go.touch()
            wait([blocker, *futures], timeout=20)
        lines = (tmp_path / "log").read_text().split()
        assert lines == ["-16", "05", "13", "22", "27", "30", "34"]
        assert compiler.stats().pending == 0

    def test_workers_start_on_demand_and_work_side_by_side(self, tmp_path: Path) -> None:
        with KernelCompiler(workers=2, nice=0) as compiler:
            assert compiler.stats().workers_started == 0
            before = set(threading.enumerate())
            for _ in range(3):
                run(compiler, "echo").result(timeout=20)
                assert eventually(lambda: compiler.stats().running == 0)
            assert len(set(threading.enumerate()) - before) == 1
            waiting = [run(compiler, "wait_for_file", str(tmp_path / name).encode()) for name in "ab"]
            assert eventually(lambda: compiler.stats().running == 2)
            queued = run(compiler, "echo")
            (tmp_path / "b").touch()
            waiting[1].result(timeout=20)
            queued.result(timeout=20)
            assert not waiting[0].done()
            (tmp_path / "a").touch()
            waiting[0].result(timeout=20)
            assert compiler.stats().workers_started == 2

    def test_start_brings_all_workers_up_ahead_of_jobs(self) -> None:
        with KernelCompiler(workers=2, nice=0) as compiler:
            assert not compiler.ready()
            compiler.start()
            assert eventually(lambda: compiler.stats().workers_ready == 2)
            assert compiler.ready()
            compiler.start()
            run(compiler, "echo").result(timeout=20)
            assert compiler.stats().workers_started == 2
        assert not compiler.ready()

    def test_closing_fails_what_is_not_done(self, tmp_path: Path) -> None:
        compiler = KernelCompiler(nice=0)
        futures = [run(compiler, "hang", str(tmp_path / "pids").encode()), run(compiler, "echo")]
        pids = pids_in(tmp_path / "pids", 2)
        compiler.close()
        compiler.close()
        for future, name in zip(futures, ("hang", "echo"), strict=True):
            assert str(error_of(future)) == f"the kernel compiler was closed before job {JOBS}:{name} was done"
        assert eventually(lambda: not any(map(is_running, pids)))
        with pytest.raises(KernelBuildError, match=f"job {JOBS}:echo was submitted to a closed kernel compiler"):
            run(compiler, "echo")

    def test_a_callback_may_close(self) -> None:
        before = set(threading.enumerate())
        compiler = KernelCompiler(nice=0)
        future = run(compiler, "echo")
        future.add_done_callback(lambda _: compiler.close())
        future.result(timeout=20)
        assert eventually(lambda: set(threading.enumerate()) <= before)


class TestDeath:
    def test_a_job_whose_worker_dies_is_tried_once_more_on_a_new_one(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with KernelCompiler(nice=0) as compiler:
            first = json.loads(run(compiler, "describe").result(timeout=20).data)["pid"]
            second = int(run(compiler, "kill_worker_once", str(tmp_path / "died").encode()).result(timeout=20).data)
            assert second != first
            assert int(json.loads(run(compiler, "describe").result(timeout=20).data)["pid"]) == second
            stats = compiler.stats()
        assert (stats.retried, stats.failed, stats.workers_started) == (1, 0, 2)
        (record,) = caplog.records
        assert "kill_worker_once ended its worker (1 of 2): exit status -9 (SIGKILL)" in record.getMessage()

    def test_a_job_that_ends_two_workers_fails(self, tmp_path: Path) -> None:
        with KernelCompiler(nice=0) as compiler:
            error = error_of(run(compiler, "kill_worker", str(tmp_path / "log").encode()))
            assert len(set((tmp_path / "log").read_text().split())) == 2
            assert str(error) == (
                f"job {JOBS}:kill_worker ended 2 worker processes, the last with exit status -9 (SIGKILL), perhaps "
                "because memory ran out; its last output:\nlast words"
            )
            assert run(compiler, "echo", b"next").result(timeout=20).data == b"next"
            assert (compiler.stats().retried, compiler.stats().failed) == (1, 1)

    def test_a_death_between_two_jobs_costs_no_job(self, caplog: pytest.LogCaptureFixture) -> None:
        with KernelCompiler(nice=0) as compiler:
            pid = json.loads(run(compiler, "describe").result(timeout=20).data)["pid"]
            os.kill(pid, signal.SIGKILL)
            assert eventually(lambda: not compiler.ready())
            assert run(compiler, "echo", b"next").result(timeout=20).data == b"next"
            assert compiler.stats().retried == 0
        assert not caplog.records

    def test_a_death_is_noticed_when_a_child_of_the_worker_lives_on(self, tmp_path: Path) -> None:
        with KernelCompiler(nice=0) as compiler:
            error = error_of(run(compiler, "kill_worker_beside_child", str(tmp_path / "child").encode()))
        assert "ended 2 worker processes" in str(error)
        assert eventually(lambda: not is_running(*pids_in(tmp_path / "child")))

    def test_a_job_that_takes_too_long_is_killed_with_its_children(self, tmp_path: Path) -> None:
        with KernelCompiler(nice=0, job_timeout=0.5) as compiler:
            error = error_of(run(compiler, "hang", str(tmp_path / "pids").encode()))
            assert str(error) == (
                f"job {JOBS}:hang was not done after 0.5 s and its worker was killed: raise job_timeout"
            )
            assert eventually(lambda: not any(map(is_running, pids_in(tmp_path / "pids", 2))))
            assert run(compiler, "echo", b"next").result(timeout=20).data == b"next"
            assert compiler.stats().retried == 0

    def test_a_failing_warm_up_is_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        with KernelCompiler(nice=0, warm=f"{JOBS}:fail") as compiler:
            assert run(compiler, "echo", b"x").result(timeout=20).data == b"x"
        (record,) = caplog.records
        assert record.getMessage().startswith(f"{JOBS}:fail failed in a new worker of the kernel compiler: {JOBS}.Work")

    def test_without_an_interpreter_jobs_fail_and_nothing_hangs(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(sys, "executable", str(tmp_path / "no_python"))
        with KernelCompiler(nice=0) as compiler:
            error = error_of(run(compiler, "echo"))
            assert str(error).startswith(f"job {JOBS}:echo could not be given to a worker process: FileNotFoundError")
            monkeypatch.undo()
            assert run(compiler, "echo", b"x").result(timeout=20).data == b"x"


class TestProcesses:
    """What is left of the workers when the process that uses them goes, in whatever way."""

    PARENT = """
        import os, sys, time
        from esper_fx.cache import Job, KernelCompiler
        compiler = KernelCompiler(workers=2, nice=0)
        for name in ("a", "b"):
            compiler.submit(Job("tests.support.cache_jobs:hang", os.path.join(sys.argv[1], name).encode()))
        future = compiler.submit(Job("tests.support.cache_jobs:hang", b"never runs"))
        while not all(os.path.exists(os.path.join(sys.argv[1], name)) for name in ("a", "b")):
            time.sleep(0.005)
        """

    def test_no_orphan_when_the_parent_is_killed(self, tmp_path: Path) -> None:
        parent = start_script(tmp_path / "parent.py", self.PARENT + "time.sleep(60)\n", tmp_path)
        pids = pids_in(tmp_path / "a", 2) + pids_in(tmp_path / "b", 2)
        assert all(map(is_running, pids))
        parent.kill()
        parent.communicate()
        assert eventually(lambda: not any(map(is_running, pids)))

    def test_no_orphan_when_a_forked_child_of_the_killed_parent_lives_on(self, tmp_path: Path) -> None:
        fork = """
        child = os.fork()
        if child:
            with open(os.path.join(sys.argv[1], "child"), "w") as file:
                file.write(str(child))
        time.sleep(60)
        """
        parent = start_script(tmp_path / "parent.py", self.PARENT + fork, tmp_path)
        pids = pids_in(tmp_path / "a", 2) + pids_in(tmp_path / "b", 2)
        (child,) = pids_in(tmp_path / "child")
        try:
            parent.kill()
            parent.wait()
            assert eventually(lambda: not any(map(is_running, pids)))
            assert is_running(child)
        finally:
            os.kill(child, signal.SIGKILL)
            parent.communicate()

    def test_the_interpreter_exits_cleanly_with_jobs_in_flight(self, tmp_path: Path) -> None:
        exit_hook = """
        import atexit
        atexit.register(lambda: print(future.exception(timeout=0)))
        """
        output = finish(start_script(tmp_path / "parent.py", exit_hook + self.PARENT + "print('the end')\n", tmp_path))
        assert output == f"the end\nthe kernel compiler was closed before job {JOBS}:hang was done\n"
        pids = pids_in(tmp_path / "a", 2) + pids_in(tmp_path / "b", 2)
        assert eventually(lambda: not any(map(is_running, pids)))

    def test_the_interpreter_exits_cleanly_with_flights_of_a_cache_under_way(self, tmp_path: Path) -> None:
        source = """
            import sys, threading, time
            from pathlib import Path
            from esper_fx.cache import ArtifactStore, Job, KernelCache, KernelCompiler, KernelKey
            store = ArtifactStore(Path(sys.argv[1]) / "kernels")
            cache = KernelCache(store=store, compiler=KernelCompiler(nice=0))
            keys = [KernelKey.of(n=n) for n in range(6)]
            for key in keys[:3]:
                store.put(key, b"x", metadata={})
            loading = threading.Event()

            def load(data):
                loading.set()
                time.sleep(60)

            for key in keys:
                cache.fetch(key, load=load, build=lambda: Job("tests.support.cache_jobs:hang", sys.argv[2].encode()))
            loading.wait()
            print("the end")
        """
        parent = start_script(tmp_path / "parent.py", source, tmp_path, tmp_path / "pids")
        assert finish(parent) == "the end\n"

    def test_a_script_needs_no_main_guard_and_its_modules_import(self, tmp_path: Path) -> None:
        (tmp_path / "neighbour.py").write_text("def shout(payload):\n    return payload.upper()\n")
        source = """
            print("once")
            from esper_fx.cache import Job, KernelCompiler
            print(KernelCompiler(nice=0).submit(Job("neighbour:shout", b"hello")).result(timeout=20).data)
            import sys
            print("torch" in sys.modules)
        """
        assert finish(start_script(tmp_path / "script.py", source)) == "once\nb'HELLO'\nFalse\n"

    def test_a_forked_child_has_workers_of_its_own(self, tmp_path: Path) -> None:
        with KernelCompiler(nice=0) as compiler:
            parents = json.loads(run(compiler, "describe").result(timeout=20).data)["pid"]
            waiting = run(compiler, "wait_for_file", str(tmp_path / "go").encode())
            assert eventually(lambda: compiler.stats().running == 1)

            def check() -> None:
                assert compiler.stats().running == 0
                facts = json.loads(run(compiler, "describe").result(timeout=20).data)
                assert facts["pid"] != parents
                compiler.close()

            assert in_forked_child(check)
            assert is_running(parents)
            (tmp_path / "go").touch()
            waiting.result(timeout=20)
            assert json.loads(run(compiler, "describe").result(timeout=20).data)["pid"] == parents


class TestArguments:
    @pytest.mark.parametrize("target", ["", "module", "module:", ":function"])
    def test_a_target_names_a_module_and_a_function(self, target: str) -> None:
        with pytest.raises(SettingsError, match=f"job target '{target}': expected 'package.module:function'"):
            Job(target, b"")
        with pytest.raises(SettingsError, match=r"expected 'package\.module:function'"):
            KernelCompiler(warm=target)

    def test_the_main_script_is_not_a_module_to_workers(self) -> None:
        with pytest.raises(SettingsError, match="a worker process cannot import the main script; move the function"):
            Job("__main__:build", b"")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"workers": 0}, "workers=0: expected at least 1"),
            ({"threads": 0}, "threads=0: expected at least 1"),
            ({"nice": -1}, "nice=-1: expected 0 to 19"),
            ({"nice": 20}, "nice=20: expected 0 to 19"),
            ({"job_timeout": 0}, "job_timeout=0: expected seconds above 0, or None for no limit"),
        ],
    )
    def test_out_of_range(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(SettingsError, match=message):
            KernelCompiler(**arguments)
