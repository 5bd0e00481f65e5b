"""Votes: how the processes that train replicas of a model agree on when a change goes live."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from esper_fx.errors import GerminationError, ReplicaError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from esper_fx.change_queue import Change
    from esper_fx.growth import Growth

#: Seconds between two looks for the others' votes, where they are not there already.
LOOK_S = 1e-4

#: One process may evaluate for long while a vote of the others is open. That one has ended is noticed at once.
TIMEOUT = timedelta(days=1)


@dataclass(frozen=True)
class Vote:
    """A vote that is open.

    Attributes:
        change: What it is about.
        ballot: What this process says, and once it is counted, what all say: int64 ``[7]``.
        work: Done when all have voted.
    """

    change: Change
    ballot: Tensor
    work: Any


class Votes:
    """The votes of the processes that train replicas of a model.

    A vote is opened after a step of the optimizer while a change is on its way, and counted after the next one, so that no step
    waits for it; whoever waits for a change anyway votes until it is there. So all processes vote at the same places, whatever
    else each of them runs.

    Attributes:
        voters: The process group of votes, with the backend gloo.
    """

    def __init__(self, growth: Growth, ranks: list[int]) -> None:
        self.voters: ProcessGroup = distributed.new_group(
            ranks, TIMEOUT, "gloo", use_local_synchronization=len(ranks) < distributed.get_world_size()
        )
        self._growth = growth
        self._open: Vote | None = None
        self._thread = threading.current_thread()  # the one that trains, which alone votes

    def end_step(self) -> None:
        """The optimizer has made a step: count the vote that is open, make what is agreed, and open the next one."""
        self._thread = threading.current_thread()
        changes = self._growth.changes
        if self._open is not None:
            self._count()
            changes.apply()
        if changes.queue:
            self._vote(staying=True)

    def look(self, staying: bool) -> bool:
        """Take part in one vote, in processes that wait; returns whether all of them wait on. Blocks."""
        if self._opens(staying):
            staying = self._count()
            self._growth.changes.apply()
        return staying

    async def look_without_thread(self) -> None:
        """As :meth:`look`, for a coroutine."""
        if self._opens(True):
            while self._open is not None and not self._open.work.is_completed():
                await asyncio.sleep(LOOK_S)
            self._count()
            self._growth.changes.apply()

    def _opens(self, staying: bool) -> bool:
        """Open a vote for whoever waits, unless one is open; False: there is nothing to vote on, or another thread does."""
        if threading.current_thread() is not self._thread:
            return False
        if self._open is None and self._growth.changes.queue:
            self._vote(staying)
        return self._open is not None

    def _vote(self, staying: bool) -> None:
        changes, clock = self._growth.changes, self._growth.clock
        with changes.lock:
            change = changes.queue.first
            ready, fine = changes.is_ready(change), change.error is None
            what = hashlib.sha256(repr(description(change)).encode()).digest()
        digest = int.from_bytes(what[:7], "big")
        # The least of all processes. Of a number and its negative: equal if it is the same everywhere.
        ballot = torch.tensor([ready, fine, staying, clock, -clock, digest, -digest])
        work = distributed.all_reduce(ballot, distributed.ReduceOp.MIN, self.voters, async_op=True)
        self._open = Vote(change, ballot, work)

    def _count(self) -> bool:
        """Count the vote that is open and follow it; returns whether all who wait wait on."""
        vote = self._open
        if vote is None:  # growth is no longer synchronized
            return True
        while not vote.work.is_completed():  # which, other than PyTorch's wait(), can be interrupted
            time.sleep(LOOK_S)
        self._open = None
        try:
            vote.work.wait()
        except RuntimeError as error:
            raise ReplicaError(f"a process that trains a replica of this model is gone: {error}") from error
        change = vote.change
        ready, fine, staying, clock, no_clock, digest, no_digest = vote.ballot.tolist()
        if clock != -no_clock:
            raise ReplicaError(
                f"the processes that train replicas of this model are not in step: their clocks are between {clock} and "
                f"{-no_clock} while {change.names} is to change. Let all of them call germinate(), prune(), wait() and "
                "settle() between the same two steps of the optimizer"
            )
        if digest != -no_digest:
            raise ReplicaError(
                f"the processes that train replicas of this model change it in different ways: here {change.names} is to "
                "change next. Let all of them call germinate(), prune() and what else changes it in the same order"
            )
        with self._growth.changes.lock:
            if ready:
                change.agreed = True
                if not fine and change.error is None:
                    change.error = GerminationError(f"{change} no kernel in another process")
        return bool(staying)

    def forget(self) -> None:
        """Growth is no longer synchronized."""
        self._open = None


def description(change: Change) -> list[Any]:
    """What tells a change from others, in every process: sites, blueprints, stages and the shapes of bodies."""
    return [(move.seed.name, move.seed.blueprint, int(move.target), *shapes(move.seed.body)) for move in change.moves]


def shapes(body: nn.Module | None) -> list[Any]:
    """Names and shapes of a body's parameters."""
    return [] if body is None else [(name, tuple(p.shape)) for name, p in body.named_parameters()]
