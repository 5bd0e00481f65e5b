"""Changes on their way while nobody trains: waiting for them, where kernels come late, fail, or are there one by one.

Stand-ins for compiled programs say when there are kernels. Timeouts are for tests that fail only.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable

import pytest

import esper_fx
from esper_fx import preparing
from esper_fx.changes import Changes
from esper_fx.lifecycle import Stage
from tests.support.processes import eventually
from tests.support.standin import Flight, StandIn, small_model


def at_boundary(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Have something happen right after every step boundary."""
    apply = Changes.apply

    def then(self: Changes) -> None:
        apply(self)
        happens()

    monkeypatch.setattr(Changes, "apply", then)


def test_wait_goes_on_where_a_program_came_between_the_kernels_and_the_boundary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model()
    training = StandIn(model)
    training.land("0")
    germination = model.seeds["0"].germinate("low_rank")
    evaluation = StandIn(model)
    at_boundary(monkeypatch, lambda: evaluation.land("0"))
    assert germination.wait(10)
    assert model.seeds["0"].stage is Stage.INCUBATING
    assert training.running == evaluation.running == {"0"}


def test_wait_goes_on_where_the_kernels_of_an_earlier_change_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    program = StandIn(model)
    program.land("0", "1")
    first, second = (model.seeds[site].germinate("low_rank") for site in ("0", "1"))
    assert eventually(lambda: model.growth.changes._boundary_work)  # the second one's kernels are there
    at_boundary(monkeypatch, lambda: program.land("0"))
    assert second.wait(10)
    assert first.done()
    assert program.running == {"0", "1"}


def test_exception_waits_for_the_reason_on_the_thread_that_trains() -> None:
    model = small_model()
    program = StandIn(model)
    germination = model.seeds["0"].germinate("low_rank")
    assert eventually(lambda: program.asked)
    assert germination.exception() is None
    program.crash("0", error=RuntimeError("out of memory"))
    assert isinstance(germination.exception(timeout=10), esper_fx.GerminationError)
    assert model.seeds["0"].stage is Stage.EMBARGOED


def test_await_makes_the_switch_on_the_thread_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    training = StandIn(model)
    training.land("0")

    async def grow() -> esper_fx.KasminaSeed:
        model.growth.changes.begin_eager_forward()
        germination = model.seeds["0"].germinate("low_rank")
        evaluation = StandIn(model)
        at_boundary(monkeypatch, lambda: evaluation.land("0"))
        seed = await asyncio.wait_for(germination, 10)
        assert training.running == evaluation.running == {"0"}
        return seed

    assert asyncio.run(grow()) is model.seeds["0"]


def test_await_raises_why_the_germination_failed() -> None:
    model = small_model()
    program = StandIn(model)

    async def grow() -> None:
        germination = model.seeds["0"].germinate("low_rank")
        while not program.asked:
            await asyncio.sleep(0)
        program.crash("0", error=RuntimeError("out of memory"))
        await asyncio.wait_for(germination, 10)

    with pytest.raises(esper_fx.GerminationError, match="site '0' has no kernel: out of memory"):
        asyncio.run(grow())


def test_who_gives_up_awaiting_can_end_and_the_germination_goes_on() -> None:
    model = small_model()
    program = StandIn(model)
    germination = model.seeds["0"].germinate("low_rank")

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(germination, 0.02)

    loop = threading.Thread(target=lambda: asyncio.run(give_up()), daemon=True)  # its end joins what it has begun
    loop.start()
    ended = eventually(lambda: not loop.is_alive())
    program.land("0")
    assert germination.wait(10)
    assert ended


def test_settle_makes_the_boundary_where_the_thread_that_ran_the_model_has_ended() -> None:
    model = small_model()
    program = StandIn(model)
    program.land("0")
    request = threading.Thread(target=model.growth.changes.begin_eager_forward)
    request.start()
    request.join()
    model.seeds["0"].germinate("low_rank")
    assert model.settle(10)
    assert program.running == {"0"}


def test_settle_leaves_the_boundary_to_the_thread_that_trains_and_looks_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    program = StandIn(model)
    program.land("0")
    begun, go, looks = threading.Event(), threading.Event(), []
    look = Changes.apply_between_steps

    def train() -> None:
        model.growth.changes.begin_eager_forward()
        begun.set()
        go.wait()
        model.growth.changes.begin_eager_forward()

    monkeypatch.setattr(Changes, "apply_between_steps", lambda self: (looks.append(self), look(self)))
    training = threading.Thread(target=train)
    training.start()
    begun.wait()
    model.seeds["0"].germinate("low_rank")
    settled = model.settle(0.1)
    running = program.running
    go.set()
    training.join()
    assert not settled
    assert running == set()
    assert len(looks) < 100
    assert model.settle(10)
    assert program.running == {"0"}


def test_a_copy_counts_what_the_original_had_begun_as_pending_and_settles_it() -> None:
    model = small_model()
    program = StandIn(model)
    model.seeds["0"].germinate("low_rank")
    other = copy.deepcopy(model)
    assert other.pending
    assert other.settle(10)
    assert other.seeds["0"].stage is Stage.INCUBATING
    assert not copy.deepcopy(other).pending
    assert model.seeds["0"].stage is Stage.GERMINATING
    assert program.running == set()


def test_a_copy_takes_up_what_the_original_had_begun_and_nothing_that_it_has_begun_itself() -> None:
    model = small_model()
    program = StandIn(model)
    model.seeds["0"].germinate("low_rank")
    other = copy.deepcopy(model)
    program = StandIn(other)
    germination = other.seeds["1"].germinate("low_rank")
    for sites in (["0"], ["1"], ["0", "1"]):
        program.land(*sites)
    assert germination.wait(10)
    assert other.settle(10)
    assert [event.to for event in other.ledger if event.site == "1"] == [Stage.GERMINATING, Stage.INCUBATING]
    assert program.running == {"0", "1"}


def pruned_without_a_kernel(monkeypatch: pytest.MonkeyPatch, pause: float) -> tuple[esper_fx.MorphableModel, StandIn]:
    """A model whose seed at 0 was live and is pruned, but no kernel without its body can be made."""
    monkeypatch.setattr(preparing, "FIRST_PAUSE_S", pause)
    model = small_model()
    program = StandIn(model)
    program.land("0")
    assert model.seeds["0"].germinate("low_rank").wait(10)
    program.lose()
    program.broken = RuntimeError("the worker died")
    model.growth.prune(model.seeds["0"], "it does not help")
    return model, program


def test_a_prune_without_a_kernel_is_tried_again_until_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, program = pruned_without_a_kernel(monkeypatch, pause=0.001)
    seed = model.seeds["0"]
    assert eventually(lambda: program.asked.count(frozenset()) > 2)
    assert (seed.stage, seed.live, seed.alpha) == (Stage.EMBARGOED, True, 0.0)
    program.broken = None
    program.land()
    assert model.settle(10)
    assert program.running == set()
    assert seed.body is None


def test_the_pauses_between_tries_double_up_to_a_bound_and_the_log_names_site_and_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preparing, "LAST_PAUSE_S", 0.004)
    _model, program = pruned_without_a_kernel(monkeypatch, pause=0.001)
    assert eventually(lambda: len(program.asked) > 5)
    assert [record.getMessage() for record in caplog.records[:5]] == [
        "the body at site '0' has to stay for now, silent: there is no kernel without (the worker died); "
        f"it is asked for again in {pause} s"
        for pause in ("0.001", "0.002", "0.004", "0.004", "0.004")
    ]


def test_seeds_that_are_pruned_together_are_put_off_and_go_together(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preparing, "FIRST_PAUSE_S", 0.001)
    model = small_model()
    program = StandIn(model)
    for sites in (["0"], ["0", "1"]):
        program.land(*sites)
        assert model.seeds[sites[-1]].germinate("low_rank").wait(10)
    program.lose()
    program.broken = RuntimeError("the worker died")
    model.growth.prune_together(list(model.seeds.values()), "the adapter was unloaded")
    assert eventually(lambda: program.asked.count(frozenset()) > 1)
    assert program.running == {"0", "1"}
    program.land()
    assert model.settle(10)
    assert program.running == set()
    assert set(program.asked) == {frozenset()}
    assert caplog.records[0].getMessage().startswith("the bodies at sites '0', '1' have to stay for now, silent: ")


def test_while_a_prune_is_put_off_it_is_pending_and_other_changes_go_live(monkeypatch: pytest.MonkeyPatch) -> None:
    model, program = pruned_without_a_kernel(monkeypatch, pause=1000.0)
    assert eventually(lambda: model.growth.changes.queue.put_off)
    program.land("0", "1")
    assert model.seeds["1"].germinate("low_rank").wait(10)
    assert program.running == {"0", "1"}
    assert not model.settle(0.05)
    assert model.pending
    assert copy.deepcopy(model).settle(10)  # a copy has no programs, and so nothing to wait for


def test_a_prune_that_is_put_off_is_withdrawn_where_another_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model, program = pruned_without_a_kernel(monkeypatch, pause=1000.0)
    assert eventually(lambda: model.growth.changes.queue.put_off)
    program.land()
    model.growth.fail(model.seeds["0"], RuntimeError("it broke"))
    assert model.settle(10)
    assert model.seeds["0"].body is None


def test_a_better_plan_that_cannot_be_had_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = small_model()
    program = StandIn(model)
    program.better = Flight(error=RuntimeError("too large"))
    for _ in range(3):
        model.growth.changes.kick()
        assert model.settle(10)
    assert [record.getMessage() for record in caplog.records] == [
        "a program runs on as it is: a plan that may be better has no kernel: too large"
    ]
