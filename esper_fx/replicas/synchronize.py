"""The processes that train replicas of one model, and what keeps what grows alike in them."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import distributed

from esper_fx.checks import shortened, shown
from esper_fx.errors import ArgumentError, ReplicaError
from esper_fx.replicas.averaging import Averaging
from esper_fx.replicas.votes import Votes, description, shapes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from esper_fx.growth import Growth
    from esper_fx.model import MorphableModel

logger = logging.getLogger(__name__)


def synchronize_growth(model: MorphableModel, process_group: ProcessGroup | None = None) -> Replicas:
    """Let a model grow alike in all processes that train replicas of it, as with `DistributedDataParallel`.

    Call it in all of them, before `DistributedDataParallel` gets the model (itself, or what `torch.compile` made of it), and
    `attach` the optimizer. From then on

    - a change goes live in the same step everywhere: after the optimizer's first step at which all processes have its kernels.
      If one of them cannot have them, the change fails in all;
    - a body begins with the values that the first process gives it, and its buffers are those of the first process. Its
      gradients are averaged at the end of each backward pass in which `DistributedDataParallel` averages its own (of each one,
      where the model is not wrapped);
    - `Germination.wait`, `await` and `model.settle` are collective: they return in all processes alike, also where the time of
      one is over.

    What changes the structure (``germinate``, ``blend``, ``prune``, ``fossilize``, adapters, checkpoints) and what waits for it
    must be called in all processes in the same order, between the same two steps of the optimizer, like collective operations.
    Where it is not, a `ReplicaError` says so at the next step. An ``await`` may be cancelled in all processes or in none, and
    `Join` contexts are not supported. A process may run further forward passes by itself, for an evaluation. Where
    `DistributedDataParallel` gets a larger module around the model, bodies that are there already cannot be pruned.

    Args:
        model: A morphed model, or what `torch.compile` has made of one.
        process_group: The processes that have a replica; default: all. Its backend averages the gradients.

    Returns:
        What undoes it, with ``stop()``.

    Raises:
        ArgumentError: ``model`` is no morphed model, or ``process_group`` no process group.
        ReplicaError: There is no process group, the model was given to this function before, or the replicas are not alike.
    """
    from esper_fx.model import morphed

    model = morphed(model, "synchronize_growth", ArgumentError)
    if process_group is not None and not (
        distributed.is_available() and isinstance(process_group, distributed.ProcessGroup)
    ):
        raise ArgumentError(
            f"synchronize_growth(process_group={shown(process_group)}): expected a torch.distributed.ProcessGroup, such as a "
            "device mesh's get_group() returns, or None for all processes"
        )
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ReplicaError(
            "synchronize_growth() needs a process group: call torch.distributed.init_process_group first, in every process"
        )
    if model.growth.replicas is not None:
        raise ReplicaError("this model's growth is synchronized already; call stop() on what that call returned first")
    model.growth.changes.apply_between_steps()  # a copy takes up what was on its way in the original
    replicas = Replicas(model.growth, distributed.group.WORLD if process_group is None else process_group)
    model.growth.replicas = replicas
    return replicas


class Replicas:
    """The processes that train replicas of one model, of which this is one.

    Attributes:
        votes: How they agree on when a change goes live.
        averaging: How bodies stay alike.
    """

    def __init__(self, growth: Growth, group: ProcessGroup | None) -> None:
        self._growth = growth
        self.votes = Votes(growth, distributed.get_process_group_ranks(group))
        self._check_alike()
        self.averaging = Averaging(growth, group, self.votes.voters)

    def stop(self) -> None:
        """Leave the others: changes go live, and gradients stay, as in a single process."""
        if self._growth.replicas is self:
            self._growth.replicas = None
            self.votes.forget()
            self._growth.changes.expect_boundary()
            self._growth.changes.kick()

    def end_step(self) -> None:
        """The optimizer has made a step."""
        self.votes.end_step()
        self.averaging.share_buffers()

    def _check_alike(self) -> None:
        seeds = [(seed.name, seed.stage.name, seed.blueprint, *shapes(seed.body)) for seed in self._growth.by_index]
        coming = [description(change) for change in self._growth.changes.queue]
        mine = {"clock": self._growth.clock, "seeds": seeds, "changes on their way": coming}
        all_of_them: list[Any] = [None] * distributed.get_world_size(self.votes.voters)
        distributed.all_gather_object(all_of_them, mine, group=self.votes.voters)
        for rank, theirs in enumerate(all_of_them):
            for what, here in mine.items():
                if here != theirs[what]:
                    raise ReplicaError(
                        f"the replicas of a model are not alike: {what} {shortened(str(here))} in this process, but "
                        f"{shortened(str(theirs[what]))} in process {rank} of the group. Morph alike and load the same "
                        "checkpoint in all of them, before synchronize_growth()"
                    )

    def check_attached(self) -> None:
        """Refuse a change that no step of an optimizer could make live."""
        attachment = self._growth.attachment
        if attachment is None or attachment.optimizer is None:
            raise ReplicaError(
                "this model grows in step with its replicas, but no optimizer is attached whose steps could be counted: call "
                "esper_fx.attach(optimizer, model) first"
            )


def warn_of_other_processes(growth: Growth) -> None:
    """Say once that nothing keeps what has grown alike in the processes of a distributed training."""
    if growth.replicas is None and distributed.is_available() and distributed.is_initialized():
        processes = distributed.get_world_size()
        if processes > 1:
            _warn_once(processes)


@cache
def _warn_once(processes: int) -> None:
    logger.warning(
        "a seed germinates in one of %d processes: DistributedDataParallel does not know modules that join after it has "
        "wrapped a model. Where these processes train replicas of it, call esper_fx.synchronize_growth(model) before",
        processes,
    )
