"""Training that was stopped, politely or not, goes on to the bit: eager and compiled."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import esper_fx
from esper_fx.engine.service import Service
from esper_fx.lifecycle import Stage
from tests.support import resumable
from tests.support.training import Training, assert_same, carried


@pytest.fixture(autouse=True)
def _fresh_and_quick() -> Iterator[None]:
    """Dynamo remembers nothing, and only the whole program is compiled for each morphology."""
    torch._dynamo.reset()
    with esper_fx.configure(blocks=False):
        yield


def _grow(run: Training, site: str, blueprint: str, **config: Any) -> None:
    assert run.model.seeds[site].germinate(blueprint, **config).wait(300)
    assert run.model.settle(300)


def _in_the_middle_of_a_blend() -> Training:
    run = Training(compiled=True)
    run.live([("train", 3)])
    _grow(run, "a", "low_rank", rank=2)
    run.live([("train", 3), ("blend", "a", 0.25, 12, "cosine"), ("train", 5)])
    assert run.model.seeds["a"].stage == Stage.BLENDING
    assert run.model.stats().plans == ("whole",)
    return run


@pytest.mark.parametrize("steps_before", [0, 2], ids=["loaded before compilation", "loaded into a compiled model"])
def test_a_compiled_run_goes_on_in_the_middle_of_a_blend_to_the_bit(steps_before: int) -> None:
    run = _in_the_middle_of_a_blend()
    saved = carried(run.save())
    expected = run.facts()
    other = Training(compiled=True, seed=1)
    other.live([("train", steps_before)])
    assert other.model.settle(300)
    other.load(saved)
    assert_same(other.facts(), expected)
    assert other.model.settle(300)
    with torch.compiler.set_stance("fail_on_recompile" if steps_before else "default"):
        other.live([("train", 12)])
    resumed = other.facts()
    assert other.model.stats().plans == ("whole",)
    torch.set_rng_state(saved["random"])
    run.live([("train", 12)])
    assert run.model.seeds["a"].stage == Stage.ACTIVE
    assert_same(resumed, run.facts())


def _loud(run: Training, site: str) -> None:
    """Have a body contribute what cannot be overlooked."""
    body = run.model.seeds[site].body
    assert body is not None
    for parameter in body.parameters():
        parameter.data.fill_(0.5)


def test_a_compiled_program_runs_the_bodies_that_it_was_loaded_with_and_no_others() -> None:
    run = _in_the_middle_of_a_blend()
    _loud(run, "a")
    saved = carried(run.model.state_dict())
    other = Training(compiled=True, seed=1)
    other.model.eval()  # without dropout
    x = torch.randn(8, 4)
    dormant = other.fast(x)
    _grow(other, "b", "bottleneck", width=2)
    _loud(other, "b")
    assert not torch.allclose(other.fast(x), dormant, atol=1e-2)
    with torch.compiler.set_stance("fail_on_recompile"):
        for state in (saved, carried(Training().model.state_dict()), saved):
            other.model.load_state_dict(state)
            actual = other.fast(x)
            torch.testing.assert_close(actual, other.model(x))
            if state is saved:
                torch.testing.assert_close(actual, run.model.eval()(x))
    assert other.model.stats().plans == ("whole",)


def test_a_program_whose_kernels_cannot_be_had_runs_eagerly_with_the_right_bodies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eager = Training()
    eager.live(
        [
            ("germinate", "c", ("low_rank", {"rank": 1, "activation": "silu"})),
            ("train", 2),
            ("blend", "c", 1.0, 0, "constant"),
            ("train", 2),
        ]
    )
    other = Training(compiled=True, seed=1)
    other.live([("train", 1)])

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler to-day")

    monkeypatch.setattr(Service, "obtain", broken)
    saved = carried(eager.save())
    other.load(saved)
    assert other.model.stats().plans == ("eager",)
    other.live([("train", 3)])
    resumed = other.facts()
    torch.set_rng_state(saved["random"])
    eager.live([("train", 3)])
    assert_same(resumed, eager.facts())


def test_a_germination_under_way_and_a_body_on_its_way_out_are_saved_and_restored() -> None:
    run = Training(compiled=True)
    run.live([("train", 1)])
    _grow(run, "c", "affine")
    run.live([("train", 1)])
    with esper_fx.configure(embargo_steps=2):
        run.model.seeds["c"].prune()
        waiting = run.model.seeds["a"].germinate("bottleneck", width=5)
        saved = carried(run.save())
        assert not waiting.done()
        assert [seed.live for seed in run.model.seeds.values()] == [False, False, True]
        other = Training(compiled=True, seed=1)
        other.live([("train", 1)])
        other.load(saved)
        assert [seed.stage for seed in other.model.seeds.values()] == [
            Stage.GERMINATING,
            Stage.DORMANT,
            Stage.EMBARGOED,
        ]
        assert other.model.seeds["c"].body is None
        assert other.model.settle(300)
        assert other.model.seeds["a"].stage == Stage.INCUBATING
        other.live([("train", 3)])
        assert other.model.seeds["c"].stage == Stage.DORMANT
        assert other.model.stats().plans == ("whole",)


# Processes that are killed.


def _start(method: str, folder: Path, plan: resumable.Plan, steps: int, kernels: Path | None) -> tuple[Any, Any]:
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":  # imports once for all children
        context.set_forkserver_preload(["__main__", "esper_fx", "tests.support.resumable"])
    folder.mkdir(exist_ok=True)
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=resumable.train, args=(folder, plan, steps, sending, kernels))
    process.start()
    sending.close()
    return process, receiving


def _finish(process: Any, receiving: Any, folder: Path) -> Any:
    """Wait for the end; returns what was reached."""
    while True:
        try:
            receiving.recv()
        except EOFError:
            break
    process.join()
    assert process.exitcode == 0
    return torch.load(folder / "final", weights_only=True)


def _kill(process: Any, receiving: Any, folder: Path, step: int, seconds: float) -> None:
    """Kill a run, with a blend under way, these seconds after it has done a step."""
    while receiving.recv() < step:
        pass
    time.sleep(seconds)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    saved = torch.load(folder / "checkpoint", weights_only=True)
    assert len(saved["losses"]) > step
    assert int(Stage.BLENDING) in saved["model"]["esper.state.stage"].tolist()
    assert not (folder / "final").exists()


def test_twenty_of_twenty_killed_runs_end_as_the_one_that_was_not_killed(tmp_path: Path) -> None:
    def start(folder: Path) -> tuple[Any, Any]:
        return _start("forkserver", folder, resumable.LONG, resumable.LONG_STEPS, None)

    expected = _finish(*start(tmp_path / "whole"), tmp_path / "whole")
    assert len(expected["losses"]) == resumable.LONG_STEPS
    rng = random.Random(0)
    for number in range(20):
        folder = tmp_path / str(number)
        _kill(*start(folder), folder, rng.choice(resumable.LONG_BLENDS), rng.uniform(0.0, 0.01))
        assert_same(_finish(*start(folder), folder), expected)


def test_a_killed_compiled_run_ends_as_the_one_that_was_not_killed(tmp_path: Path, kernel_folder: Path) -> None:
    def start(folder: Path) -> tuple[Any, Any]:
        return _start("spawn", folder, resumable.SHORT, resumable.SHORT_STEPS, kernel_folder)

    expected = _finish(*start(tmp_path / "whole"), tmp_path / "whole")
    rng = random.Random(1)
    folder = tmp_path / "killed"
    _kill(*start(folder), folder, rng.choice(resumable.SHORT_BLENDS), rng.uniform(0.0, 0.01))
    assert_same(_finish(*start(folder), folder), expected)
