"""A program: what one Dynamo graph becomes, for whatever sizes it is called with."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from esper_fx import _torch, ops
from esper_fx.cache._background import ForkSafeLock
from esper_fx.engine.executable import StaleError
from esper_fx.engine.sized_program import SizedProgram, warn_once
from esper_fx.passes.carry_sizes import SizesError
from esper_fx.passes.propagate import is_seed

if TYPE_CHECKING:
    from esper_fx.growth import Growth

logger = logging.getLogger(__name__)

#: Where a graph cannot be compiled for all sizes at once, it is for so many combinations of them; further ones run eagerly.
MAX_SIZES = 8


class Program:
    """A Dynamo graph, for whatever sizes it is called with.

    Attributes:
        growths: The morphable models whose seeds are in the graph.
        epochs: For each growth, by its handle, the step in which the program ran last.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        handles = [node.args[3] for node in module.graph.nodes if is_seed(node)]
        self.growths: list[Growth] = [ops.hosts[handle] for handle in dict.fromkeys(handles)]  # type: ignore[misc]
        self.epochs = dict.fromkeys(handles, -1)
        self._general: SizedProgram | None = None  # for all sizes that its kernels take, where it can be had
        self._sized: dict[tuple[int, ...], SizedProgram] = {}  # for sizes of their own
        self._rest: SizedProgram | None = None  # for all sizes that have none of their own, once no more get one
        self._integers = tuple(
            i for i, node in enumerate(n for n in module.graph.nodes if n.op == "placeholder") if not _is_tensor(node)
        )
        self._lock = ForkSafeLock()
        self._nested = _has_nested_seeds(module)

    def __call__(self, *args: Any) -> Any:
        started = time.perf_counter()
        if not _torch.in_backward():  # where checkpointing runs a forward pass again: with what it ran with before
            for growth in self.growths:
                growth.changes.enter(self)
        sized = self._for_sizes_of(args)
        if sized is None:
            with self._lock:
                sized = self._for_sizes_of(args) or self._first_call(args)
            started = time.perf_counter()  # what a first call takes is no part of a step
        executable = (sized.measuring.executable(sized, args) if self._sampling() else None) or sized.active
        host = time.perf_counter() - started
        for growth in self.growths:
            growth.changes.count_host_time(host)
        if sized.aliased is not None and sized.aliased(args):
            warn_once("a call runs eagerly because an input that it changes in place shares memory with another one")
            return self.module(*args)
        try:
            return executable(args)
        except StaleError:
            return sized.renew(args)

    def _sampling(self) -> bool:
        """Whether this call is to be measured."""
        samplers = [growth.sampler for growth in self.growths]  # read once: another thread may close them
        if not any(sampler is not None and sampler.sampling for sampler in samplers):
            return False
        return not _torch.may_be_repeated()

    def _for_sizes_of(self, args: Sequence[Any]) -> SizedProgram | None:
        sized = self._sized.get(self._sizes(args)) if self._sized else None
        if sized is None and (general := self._general) is not None and general.takes(args):
            sized = general
        return sized or self._rest

    def _sizes(self, args: Sequence[Any]) -> tuple[int, ...]:
        return tuple(args[i] for i in self._integers)

    def _first_call(self, args: Sequence[Any]) -> SizedProgram:
        sized = self._make_general(args) or self._make_sized(args)
        for growth in self.growths:
            growth.changes.programs.add(sized)
            growth.changes.kick()
        return sized

    def _make_general(self, args: Sequence[Any]) -> SizedProgram | None:
        """A program for all sizes; None where there cannot be one, or has been."""
        if self._nested or self._general is not None or not self._integers:
            return None
        try:
            general = SizedProgram(self, args, vary=True)
        except SizesError as error:
            logger.debug("a program is compiled for each of its sizes: %s", error)
            return None
        self._general = general
        return general if general.takes(args) else None

    def _make_sized(self, args: Sequence[Any]) -> SizedProgram:
        if self._nested or len(self._sized) >= MAX_SIZES:
            reason = "its seeds sit in a nested graph" if self._nested else f"it was called with over {MAX_SIZES} sizes"
            warn_once(f"a program runs eagerly because {reason}")
            sized = self._rest = SizedProgram(self, args, eager=True)
        else:
            sized = self._sized[self._sizes(args)] = SizedProgram(self, args)
        return sized


def _is_tensor(placeholder: fx.Node) -> bool:
    return isinstance(placeholder.meta.get("example_value"), torch.Tensor)


def _has_nested_seeds(module: fx.GraphModule) -> bool:
    return any(
        is_seed(node)
        for child in module.modules()
        if child is not module and isinstance(child, fx.GraphModule)
        for node in child.graph.nodes
    )
