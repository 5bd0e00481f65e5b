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
from esper_fx.engine.bodies import BodySizesError
from esper_fx.engine.executable import StaleError
from esper_fx.engine.sized_program import SizedProgram, warn_once
from esper_fx.errors import SiteError
from esper_fx.passes.carry_sizes import SizesError
from esper_fx.passes.propagate import is_seed
from esper_fx.passes.wrapped_numbers import wrapped_numbers

if TYPE_CHECKING:
    from esper_fx.growth import Growth

logger = logging.getLogger(__name__)

#: A graph is compiled at most so often for sizes for which what was compiled before is not right; further ones run eagerly.
MAX_SIZES = 8

#: After so many failures to compile for sizes that vary, it is for fixed ones only.
MAX_FAILURES = 2

#: A number that a graph is given and that is no size becomes a constant: it may be another one so often.
MAX_NUMBERS = 2


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
        self._nested = _has_nested_seeds(module)
        self._integers = tuple(
            i for i, node in enumerate(n for n in module.graph.nodes if n.op == "placeholder") if not _is_tensor(node)
        )
        self._numbers = wrapped_numbers(module.graph)
        self._seen_numbers: set[tuple[str, ...]] = set()
        self._varying: list[SizedProgram] = []  # each for all sizes that its kernels take
        self._sized: dict[tuple[Any, ...], SizedProgram] = {}  # each for sizes of its own
        self._varies = not self._nested and bool(self._integers)  # whether there may be more for sizes that vary
        self._failures = 0  # to make one
        self._rest: SizedProgram | None = None  # for all sizes that have none of their own, once no more get one
        self._lock = ForkSafeLock()

    def __call__(self, *args: Any) -> Any:
        outputs = self._run(args)
        for growth in self.growths:
            if growth.replicas is not None and not _torch.in_backward():
                growth.replicas.averaging.end_forward(outputs)
        return outputs

    def _run(self, args: tuple[Any, ...]) -> Any:
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
        if not sized.takes(args, executable):  # another thread has switched meanwhile
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
        own = self._sized.get(self._fixed(args)) if self._sized else None
        if own is not None:
            return own
        for program in self._varying:
            if program.takes(args):
                return program
        return self._rest

    def _sizes(self, args: Sequence[Any]) -> tuple[int, ...]:
        return tuple(args[i] for i in self._integers)

    def _fixed(self, args: Sequence[Any]) -> tuple[Any, ...]:
        return (*self._sizes(args), *(repr(args[i].item()) for i in self._numbers))

    def _first_call(self, args: Sequence[Any]) -> SizedProgram:
        self._drop_retired()
        self._seen_numbers.add(self._fixed(args)[len(self._integers) :])
        if self._full:
            return self._known(self._make_rest(args))
        if self._varies and all(isinstance(size, int) and size >= 2 for size in self._sizes(args)):
            try:
                program = SizedProgram(self, args, vary=True)
            except SiteError:
                raise
            except Exception as error:
                logger.info("a program is compiled for fixed sizes: %s: %s", type(error).__name__, error)
                self._failures += not isinstance(error, BodySizesError)  # which has gone when the body has
                self._varies = not isinstance(error, SizesError) or isinstance(error, BodySizesError)
                self._varies &= self._failures < MAX_FAILURES
            else:
                self._varying = [*self._varying, program]
                return self._known(program)
        sized = self._sized[self._fixed(args)] = SizedProgram(self, args)
        return self._known(sized)

    @property
    def _full(self) -> bool:
        """Whether no more is compiled."""
        many = len(self._varying) + len(self._sized) >= MAX_SIZES or len(self._seen_numbers) > MAX_NUMBERS
        return many or self._nested

    def _drop_retired(self) -> None:
        for program in self._varying:
            if program.retired:
                for growth in self.growths:
                    with growth.lock:
                        growth.changes.programs.discard(program)
        self._varying = [program for program in self._varying if not program.retired]

    def _known(self, sized: SizedProgram) -> SizedProgram:
        """Let the changes of its models' structure go through a program, too."""
        for growth in self.growths:
            with growth.lock:
                growth.changes.programs.add(sized)
            growth.changes.kick()
        return sized

    def _make_rest(self, args: Sequence[Any]) -> SizedProgram:
        reason = "its seeds sit in a nested graph" if self._nested else f"it was called with over {MAX_SIZES} sizes"
        if len(self._seen_numbers) > MAX_NUMBERS:
            reason = f"a number that it is given has had over {MAX_NUMBERS} values; hand it over as a tensor"
        warn_once(f"a program runs eagerly because {reason}")
        self._rest = SizedProgram(self, args, eager=True)
        return self._rest


def _is_tensor(placeholder: fx.Node) -> bool:
    return isinstance(placeholder.meta.get("example_value"), torch.Tensor)


def _has_nested_seeds(module: fx.GraphModule) -> bool:
    return any(
        is_seed(node)
        for child in module.modules()
        if child is not module and isinstance(child, fx.GraphModule)
        for node in child.graph.nodes
    )
