"""Replicas of a model in several processes: changes at the same step, the same values, averaged gradients."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import esper_fx
from esper_fx import preparing
from esper_fx.errors import ArgumentError, GerminationError, ReplicaError
from esper_fx.lifecycle import Stage
from esper_fx.replicas import synchronize
from tests.support.processes import eventually
from tests.support.replicas import in_replicas
from tests.support.standin import StandIn, small_model


@pytest.mark.parametrize("processes", [1, 2])
def test_it_is_said_once_that_nothing_keeps_what_has_grown_alike(
    processes: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    synchronize._warn_once.cache_clear()
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: processes)
    x = torch.zeros(2, 4)
    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), sites="*", example_inputs=(x,))
    for seed in model.seeds.values():
        seed.germinate("affine")
    model(x)
    assert all(seed.live for seed in model.seeds.values())
    said = [record.getMessage() for record in caplog.records if "synchronize_growth" in record.getMessage()]
    assert len(said) == processes - 1


# Changes, with programs that stand in for compiled ones.


class Trainer:
    """A model whose steps are counted by an optimizer, and a program that stands in for the compiled one."""

    def __init__(self, group: Any = None) -> None:
        self.model = small_model()
        self.handle = esper_fx.synchronize_growth(self.model, group)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        esper_fx.attach(self.optimizer, self.model)
        self.program = StandIn(self.model)

    def forward(self) -> None:
        self.model.growth.changes.begin_step()

    def step(self, until: Callable[[], object] | None = None) -> None:
        """A step of training; with ``until`` as many as it takes in this process, and as many in all."""
        for _ in itertools.count():
            self.forward()
            self.optimizer.step()
            over = torch.tensor(0 if until is None or until() else 1)
            distributed.all_reduce(over)
            if not over:
                return

    def events(self) -> list[tuple[int, str, str]]:
        return [(event.step, event.site, event.to.name) for event in self.model.ledger]


def test_a_change_goes_live_in_the_same_step_once_all_have_its_kernels() -> None:
    def run(rank: int) -> Any:
        trainer = Trainer()
        changes = trainer.model.growth.changes
        trainer.model.seeds["0"].germinate("low_rank")
        if rank == 0:
            trainer.program.land("0")
            assert eventually(lambda: changes.queue.first.ready)
        for _ in range(3):
            trainer.step()
        early = trainer.program.running
        trainer.program.land("0")
        trainer.step(until=lambda: not changes.queue or changes.queue.first.ready)
        for _ in range(3):
            trainer.step()
        return early, trainer.program.running, trainer.events()

    first, second = in_replicas(run)
    assert first == second
    assert first[0] == frozenset()
    assert first[1] == {"0"}
    assert first[2][-1][1:] == ("0", "INCUBATING")
    assert first[2][-1][0] > 3


def test_a_change_whose_kernels_one_process_cannot_have_fails_in_all() -> None:
    def run(rank: int) -> Any:
        trainer = Trainer()
        seed = trainer.model.seeds["0"]
        if rank == 1:
            trainer.program.broken = RuntimeError("no compiler")
        else:
            trainer.program.land("0")
        germination = seed.germinate("low_rank")
        assert germination.wait(60)
        error = germination.exception()
        assert isinstance(error, GerminationError)
        trainer.program.land()
        assert trainer.model.settle(60)
        return str(error), seed.stage, trainer.program.running, trainer.events()

    first, second = in_replicas(run)
    assert first[0] == "the body at site '0' has no kernel in another process"
    assert second[0] == "the body at site '0' has no kernel: no compiler"
    assert first[1:3] == second[1:3] == (Stage.EMBARGOED, frozenset())
    assert first[3] == second[3]


@pytest.mark.parametrize("way", ["wait", "settle", "await"])
def test_who_waits_is_done_in_all_processes_alike(way: str) -> None:
    def run(rank: int) -> Any:
        trainer = Trainer()
        for _ in range(2):
            trainer.step()
        germination = trainer.model.seeds["1"].germinate("affine")
        if rank == 0:
            trainer.program.land("1")
        else:
            trainer.program.asked.clear()
        if way != "await":
            wait = germination.wait if way == "wait" else trainer.model.settle
            assert not wait(0)
            assert not wait([0.05, 600.0][rank]), "one has no time left, so none waits on"
        trainer.program.land("1")
        if way == "await":
            asyncio.run(_wait(germination))
        else:
            assert wait(600.0)
        return germination.done(), trainer.program.running, trainer.events()

    first, second = in_replicas(run)
    assert first == second
    assert first[:2] == (True, {"1"})


async def _wait(germination: esper_fx.Germination) -> None:
    await germination


def test_forward_passes_of_one_process_alone_do_no_harm() -> None:
    def run(rank: int) -> Any:
        trainer = Trainer()
        zero, one = trainer.model.seeds["0"], trainer.model.seeds["1"]
        for sites in (["0"], ["1"], ["0", "1"]):
            trainer.program.land(*sites)
        stages = []
        for step in range(14):
            trainer.step()
            if rank == 0:  # an evaluation, and a program for it
                for _ in range(3):
                    trainer.forward()
                late = StandIn(trainer.model)
                late.land("0")
                late.land("1")
            stages.append((zero.stage, one.stage))
            if step in (1, 4):
                zero.germinate("affine")
            if step == 4:
                assert not trainer.model.settle(0)
            if step == 2:
                trainer.model.growth.prune_together([zero], "before it is live", embargo_steps=0)
                one.germinate("affine")
            if step == 3:
                trainer.model.settle(0.01)
            if step == 8:
                saved = copy.deepcopy(trainer.model.state_dict())
            if step == 9:
                one.prune("loaded meanwhile")
            if step == 10:
                trainer.model.load_state_dict(saved)
        return stages, trainer.program.running, trainer.events()

    first, second = in_replicas(run)
    assert first == second


def test_changes_that_are_not_the_same_are_refused_and_so_are_steps_that_are_not() -> None:
    def run(rank: int) -> Any:
        trainer = Trainer()
        trainer.model.seeds[str(rank)].germinate("affine")
        trainer.step()
        with pytest.raises(ReplicaError) as other:
            trainer.optimizer.step()
        trainer = Trainer()
        if rank == 1:
            trainer.optimizer.step()
        trainer.model.seeds["0"].germinate("affine")
        trainer.optimizer.step()
        with pytest.raises(ReplicaError) as late:
            trainer.optimizer.step()
        return str(other.value), str(late.value)

    for rank, (other, late) in enumerate(in_replicas(run)):
        assert other == (
            "the processes that train replicas of this model change it in different ways: here the body at site "
            f"'{rank}' is to change next. Let all of them call germinate(), prune() and what else changes it in the same order"
        )
        assert late == (
            "the processes that train replicas of this model are not in step: their clocks are between 1 and 2 while the body "
            "at site '0' is to change. Let all of them call germinate(), prune(), wait() and settle() between the same two "
            "steps of the optimizer"
        )


def test_a_wait_that_is_cancelled_in_one_process_only_is_an_error_and_no_deadlock() -> None:
    def run(rank: int) -> Any:
        trainer = Trainer()
        germination = trainer.model.seeds["0"].germinate("affine")

        async def wait() -> None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_wait(germination), [0.05, 0.5][rank])

        with pytest.raises(ReplicaError, match="not in step"):
            asyncio.run(wait())
            for _ in range(4):
                trainer.optimizer.step()
        return True

    assert in_replicas(run) == [True, True]


def test_another_thread_than_the_one_that_trains_only_looks_on() -> None:
    def run(rank: int) -> Any:
        trainer = Trainer()
        waited = []
        germination = trainer.model.seeds["0"].germinate("affine")
        thread = threading.Thread(target=lambda: waited.append(germination.wait(60)))
        if rank == 0:
            thread.start()
        trainer.program.land("0")
        trainer.step(until=germination.done)
        if rank == 0:
            thread.join()
            assert waited == [True]
        return trainer.events()

    first, second = in_replicas(run)
    assert first == second


def test_without_an_optimizer_whose_steps_count_nothing_changes() -> None:
    def run(rank: int) -> Any:
        model = small_model()
        esper_fx.synchronize_growth(model)
        with pytest.raises(ReplicaError) as problem:
            model.seeds["0"].germinate("affine")
        assert model.seeds["0"].stage == Stage.DORMANT
        return str(problem.value)

    assert in_replicas(run, processes=1) == [
        "this model grows in step with its replicas, but no optimizer is attached whose steps could be counted: call "
        "esper_fx.attach(optimizer, model) first"
    ]


def test_a_prune_without_a_kernel_in_one_process_waits_for_it_in_its_turn() -> None:
    def run(rank: int) -> Any:
        preparing.FIRST_PAUSE_S = 0.001
        trainer = Trainer()
        zero, one = trainer.model.seeds["0"], trainer.model.seeds["1"]
        for sites in (["0"], ["1"], ["0", "1"]):
            trainer.program.land(*sites)
        assert zero.germinate("affine").wait(60)
        if rank == 1:
            trainer.program.lose()
            trainer.program.broken = RuntimeError("no compiler")
        zero.prune()
        germination = one.germinate("affine")
        assert not germination.wait(0.2)
        assert trainer.program.running == {"0"}
        if rank == 1:
            assert eventually(lambda: trainer.program.asked.count(frozenset()) > 2)
            preparing.FIRST_PAUSE_S = 0.2
            asked = len(trainer.program.asked)
            for _ in range(20):
                trainer.model.growth.changes.kick()
                time.sleep(0.005)
            assert len(trainer.program.asked) <= asked + 2
            trainer.program.broken = None
            trainer.program.land()
        assert germination.wait(60)
        return trainer.program.running, trainer.events()

    first, second = in_replicas(run)
    assert first == second
    assert first[0] == {"1"}


def test_a_program_that_has_come_in_one_process_since_the_vote_runs_eagerly_at_first() -> None:
    def run(rank: int) -> Any:
        trainer = Trainer()
        trainer.program.land("0")
        trainer.model.seeds["0"].germinate("low_rank")
        trainer.step()  # the vote is open
        if rank == 1:
            late = StandIn(trainer.model)
        trainer.step()
        eager = rank == 1 and late.eager
        live = trainer.model.seeds["0"].live
        if rank == 1:
            late.land("0")
        assert trainer.model.settle(60)
        return live, eager, rank == 1 and (late.eager, late.running), trainer.events()

    first, second = in_replicas(run)
    assert first[0]
    assert second[0]
    assert second[1:3] == (True, (False, {"0"}))
    assert first[3] == second[3]


def test_left_alone_a_process_changes_by_itself_and_so_does_a_copy() -> None:
    def run(rank: int) -> Any:
        trainer = Trainer()
        model = trainer.model
        trainer.program.land("1")
        assert model.seeds["1"].germinate("affine").wait(60)
        with pytest.raises(ReplicaError, match="is synchronized already"):
            esper_fx.synchronize_growth(model)
        twin = copy.deepcopy(model)
        if rank == 0:
            trainer.program.land("0", "1")
        germination = model.seeds["0"].germinate("affine")
        assert not germination.wait(0.05)
        assert trainer.handle is model.growth.replicas
        trainer.handle.stop()
        for one in (model, twin):
            one(torch.full((1, 4), rank + 1.0)).sum().backward()
        if rank == 0:
            assert germination.wait(60)
            assert trainer.program.running == {"0", "1"}
        bodies = [one.seeds["1"].body for one in (model, twin)]
        return [p.grad.tolist() for body in bodies if body is not None for p in body.parameters() if p.grad is not None]

    first, second = in_replicas(run)
    assert len(first) == 4
    for mine, theirs in zip(first[::2], second[::2], strict=True):
        assert mine != theirs


def test_only_the_processes_of_the_group_have_to_take_part() -> None:
    def run(rank: int) -> Any:
        group = distributed.new_group([0, 2])
        if rank == 1:
            return None
        trainer = Trainer(group)
        trainer.program.land("0")
        assert trainer.model.seeds["0"].germinate("affine").wait(60)
        trainer.model(torch.full((1, 4), rank + 1.0)).sum().backward()
        body = trainer.model.seeds["0"].body
        assert body is not None
        return trainer.program.running, [p.grad.tolist() for p in body.parameters() if p.grad is not None]

    first, _, third = in_replicas(run, processes=3)
    assert first == third
    assert first[0] == {"0"}


def test_replicas_must_be_alike_and_there_must_be_a_process_group() -> None:
    with pytest.raises(ReplicaError, match="needs a process group: call torch.distributed.init_process_group first"):
        esper_fx.synchronize_growth(small_model())
    with pytest.raises(ArgumentError, match="needs a morphed model, not a Linear"):
        esper_fx.synchronize_growth(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError) as wrong:
        esper_fx.synchronize_growth(small_model(), "all")  # type: ignore[arg-type]
    assert str(wrong.value) == (
        "synchronize_growth(process_group='all'): expected a torch.distributed.ProcessGroup, such as a device mesh's "
        "get_group() returns, or None for all processes"
    )

    def run(rank: int) -> str:
        model = small_model()
        if rank == 1:
            model.seeds["1"].germinate("affine")
        with pytest.raises(ReplicaError) as problem:
            esper_fx.synchronize_growth(model)
        assert model.growth.replicas is None
        return str(problem.value)

    zero, asleep = "('0', 'DORMANT', None)", "('1', 'DORMANT', None)"
    awake = "('1', 'INCUBATING', 'affine', ('scale', (4,)), ('shift', (4,)))"
    assert in_replicas(run) == [
        f"the replicas of a model are not alike: seeds [{zero}, {here}] in this process, but [{zero}, {there}] in process "
        f"{rank} of the group. Morph alike and load the same checkpoint in all of them, before synchronize_growth()"
        for rank, here, there in ((1, asleep, awake), (0, awake, asleep))
    ]


# Values and gradients, of models that run eagerly.


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, generator=generator).double(), torch.randn(8, 2, generator=generator).double()


def life(model: esper_fx.MorphableModel, call: nn.Module, part: slice, accumulate: int = 1) -> dict[str, Tensor]:
    """Train through the whole life of two seeds on a part of each batch; returns all that was learned."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    esper_fx.attach(optimizer, model)
    first, second = model.seeds["1"], model.seeds["3"]
    for step in range(14):
        if step == 2:
            first.germinate("low_rank", rank=2).wait()
        if step == 3:
            first.blend(steps=2)
            second.germinate("bottleneck", width=3).wait()
        if step == 8:
            second.prune()
        optimizer.zero_grad()
        for micro in range(accumulate):
            x, y = batch(step * accumulate + micro)
            (call(x[part]) - y[part]).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    assert [seed.live for seed in (first, second)] == [True, False]
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_with_half_a_batch_each_learn_what_one_learns_with_all_of_it(accumulate: int) -> None:
    def run(rank: int) -> Any:
        model = esper_fx.morph(network(), sites=["1", "3"], example_inputs=batch(0)[:1], seed=rank)
        esper_fx.synchronize_growth(model)
        learned = life(model, DistributedDataParallel(model), slice(rank * 4, rank * 4 + 4), accumulate)
        return {name: value.numpy() for name, value in learned.items()}

    alone = esper_fx.morph(network(), sites=["1", "3"], example_inputs=batch(0)[:1], seed=0)
    expected = life(alone, alone, slice(None), accumulate)
    for learned in in_replicas(run):
        assert learned.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                torch.from_numpy(learned[name]), value, rtol=1e-9, atol=1e-12, equal_nan=True, msg=name
            )


class Branches(nn.Module):
    """Two branches, of which a call takes those that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)

    def forward(self, x: Tensor, left: bool, right: bool) -> Tensor:
        y = x.sum(-1, keepdim=True)
        y = y + self.left(x) if left else y
        return y + self.right(x) if right else y


def attached(net: nn.Module, *sites: str, example: tuple[Any, ...]) -> esper_fx.MorphableModel:
    model = esper_fx.morph(net, sites=list(sites), example_inputs=example)
    esper_fx.synchronize_growth(model)
    model.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # type: ignore[assignment]
    esper_fx.attach(model.optimizer, model)  # type: ignore[arg-type]
    return model


def gradients(model: esper_fx.MorphableModel, *sites: str) -> list[Any]:
    bodies = [model.seeds[site].body for site in sites]
    return [
        [None if p.grad is None else p.grad.tolist() for p in body.parameters()] for body in bodies if body is not None
    ]


def test_a_body_that_one_process_does_not_use_gets_a_share_and_one_that_none_uses_gets_nothing() -> None:
    def run(rank: int) -> Any:
        torch.manual_seed(0)
        model = attached(Branches(), "left", "right", example=(torch.ones(1, 4), True, True))
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        found = []
        for site, calls in (("right", [(True, rank == 0)]), ("left", [(True, rank == 0), (True, False)])):
            model.seeds[site].germinate("affine").wait()
            for left, right in calls:
                model.zero_grad()
                wrapped(torch.full((1, 4), rank + 1.0), left, right).sum().backward()
                found.append(gradients(model, "left", "right"))
        return found

    first, second = in_replicas(run)
    assert first == second
    (right,), (left, right_again), (left_again, unused) = first
    assert right == right_again
    assert left == left_again
    assert None not in right + left
    assert unused == [None, None]


def test_where_distributed_data_parallel_does_not_average_bodies_gradients_are_not_averaged_either() -> None:
    def run(rank: int) -> Any:
        model = attached(network(), "1", example=batch(0)[:1])
        wrapped = DistributedDataParallel(model)
        model.seeds["1"].germinate("affine").wait()
        found = []
        with wrapped.no_sync():
            for micro in range(3 - rank):
                wrapped(batch(micro)[0]).sum().backward()
        found.append(gradients(model, "1"))
        wrapped(batch(3)[0]).sum().backward()
        found.append(gradients(model, "1"))
        if rank == 0:  # what looks into the model by itself
            model(batch(4)[0]).sum().backward()
        return found

    (alone, together), (other, together_too) = in_replicas(run)
    assert alone != other
    assert together == together_too


def test_what_was_there_before_is_that_of_the_first_process_and_buffers_stay_so() -> None:
    def run(rank: int) -> Any:
        model = esper_fx.morph(network(), sites=["1"], example_inputs=batch(0)[:1], seed=rank)
        model.seeds["1"].germinate("test_normalised")
        body = model.seeds["1"].body
        assert body is not None
        different = str(body.state_dict())
        esper_fx.synchronize_growth(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        esper_fx.attach(optimizer, model)
        same = str(body.state_dict())
        for step in range(3):
            model(batch(2 * step + rank)[0]).sum().backward()
            optimizer.step()
        return different, same, str(body.state_dict())

    (mine, *others), (theirs, *other_others) = in_replicas(run)
    assert mine != theirs
    assert others == other_others


@esper_fx.blueprint("test_normalised", replace=True)
def _normalised(site: esper_fx.SiteSpec) -> nn.Module:
    last = nn.Linear(site.features, site.features)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(site.features, site.features), nn.BatchNorm1d(site.features), last).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_any_dtype_are_averaged(dtype: torch.dtype) -> None:
    def run(rank: int) -> Any:
        torch.manual_seed(0)
        model = attached(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype), "0", example=(torch.ones(2, 4).to(dtype),)
        )
        model.seeds["0"].germinate("affine").wait()
        model(torch.full((2, 4), rank + 1.0).to(dtype)).sum().backward()
        return gradients(model, "0")

    first, second = in_replicas(run)
    assert first == second


def test_gradients_are_averaged_with_another_backend_too() -> None:
    def run(rank: int) -> Any:
        model = attached(network(), "1", example=batch(0)[:1])
        compiled = torch.compile(model, backend="eager")
        compiled(batch(rank)[0])
        model.seeds["1"].germinate("low_rank", rank=2).wait()
        compiled(batch(rank)[0]).sum().backward()
        return gradients(model, "1")

    first, second = in_replicas(run)
    assert first == second
    assert None not in first[0]


def test_the_example_of_the_readme() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n([^`]*?synchronize_growth.*?)```", readme, flags=re.DOTALL)

    def run(rank: int) -> Any:
        names = {"esper_fx": esper_fx, "torch": torch, "net": network(), "x": batch(0)[0]}
        exec(example, names)
        model, wrapped = names["model"], names["fast"]._orig_mod
        model.seeds["1"].germinate("affine").wait()
        wrapped(batch(rank)[0]).sum().backward()
        names["optimizer"].step()
        return {name: str(value.tolist()) for name, value in model.state_dict().items()}  # as a NaN is not itself

    first, second = in_replicas(run)
    assert first == second


def test_distributed_data_parallel_leaves_bodies_alone_so_that_they_may_go() -> None:
    def run(rank: int) -> Any:
        model = esper_fx.morph(network(), sites=["1", "3"], example_inputs=batch(0)[:1])
        model._ddp_params_and_buffers_to_ignore = ["4.bias"]
        assert model._ddp_params_and_buffers_to_ignore == ["4.bias"]
        model.seeds["1"].germinate("low_rank", rank=2, weights=_ones(model))
        esper_fx.synchronize_growth(model)
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        esper_fx.attach(optimizer, wrapped)
        x, _ = batch(rank)
        for step in range(4):
            if step == 2:
                averaged = gradients(model, "1")
                model.seeds["1"].prune()
                model.settle()
            wrapped(x).sum().backward()
        own = model.get_parameter("4.bias").grad
        assert own is not None
        return averaged, {n for n in wrapped.parameters_to_ignore if not n.startswith("_orig_mod.")}

    first, second = in_replicas(run)
    assert first[0] == second[0] != []
    assert {"4.bias", "esper.state.alpha"} < first[1]
    assert any(".body." in name for name in first[1])


def _ones(model: esper_fx.MorphableModel) -> dict[str, Tensor]:
    body = esper_fx.blueprints.get("low_rank").build(model.seeds["1"].site, {"rank": 2}, seed=0)
    return {name: torch.ones_like(value) for name, value in body.state_dict().items()}
