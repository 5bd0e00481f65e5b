"""Executables: a plan with its kernels, which a step calls, and what a program needs to know of one to run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from esper_fx.engine.plan import Assignment, Constant, Place, Plan
from esper_fx.engine.region import Region, Variant
from esper_fx.engine.strides import copied, differing, restrided
from esper_fx.engine.varying import Guards
from esper_fx.passes.metas import Size, TensorMeta, evaluate, sizes
from esper_fx.passes.record import BodyGraph

if TYPE_CHECKING:
    from esper_fx.seed import KasminaSeed


class Executable:
    """A plan with its kernels: call it with the program's inputs.

    It keeps the bodies it was made for, so that a call that is under way in another thread survives a switch.

    Args:
        plan: The plan.
        kernels: For each of its regions the kernel.
        seeds: For each slot of the program its seed, or None where that is dormant.
        assignment: For each slot what its body was recorded as.
        own: Positions of the outputs that are copied where they need gradients, because a kernel has saved their memory
            for its backward pass, and the caller may change them in place before that.
    """

    def __init__(
        self,
        plan: Plan,
        kernels: Sequence[Any],
        seeds: Sequence[KasminaSeed | None],
        assignment: Assignment,
        own: Sequence[int] = (),
    ) -> None:
        self._places = plan.places
        self._varying = plan.varying
        self._guards = Guards(plan, kernels, assignment)
        self._outputs = plan.outputs
        self._own = tuple(own)
        slots = [[slot for slot in region.slots if seeds[slot] is not None] for region in plan.regions]
        self._steps = [
            (kernel, region, tuple(_given(seeds[slot], assignment[slot]) for slot in inside))
            for region, kernel, inside in zip(plan.regions, kernels, slots, strict=True)
        ]
        #: For each region the positions of the outputs that need other strides; known once it has run.
        self._odd: list[tuple[int, ...] | None] = [None] * len(self._steps)

    @property
    def current(self) -> bool:
        """Whether the bodies' tensors are still of the kinds that the kernels were compiled for."""
        return all(given.current(given.inputs()) for _, _, bodies in self._steps for given in bodies)

    def takes(self, args: Sequence[Any]) -> bool:
        """Whether the kernels are right for the sizes of these inputs."""
        return self._guards.hold(args)

    def __call__(self, args: Sequence[Any]) -> Any:
        """Run the kernels.

        Raises:
            StaleError: A body's tensors are of other kinds than the kernels were compiled for. Nothing has been run.
        """
        given = [[body.checked() for body in bodies] for _, _, bodies in self._steps]
        environment = [*args, *[None] * (self._places - len(args))]
        for number, (kernel, region, _) in enumerate(self._steps):
            values = [environment[place] for place in region.inputs]
            for tensors in given[number]:
                values += tensors
            results = kernel(*values)
            odd = self._odd[number]
            if odd is None:
                odd = differing(results, self._strides(region, args))
                if not self._varying.places or all(min(result.shape, default=2) > 1 for result in results):
                    self._odd[number] = odd  # no other sizes tell more
            if odd:
                results, strides = list(results), self._strides(region, args)
                for position in odd:
                    results[position] = restrided(results[position], strides[position])
            for place, result in zip(region.outputs, results, strict=True):
                environment[place] = result
            for place in region.frees:
                environment[place] = None
        outputs = [
            environment[item.index] if type(item) is Place else self._other_output(item, args) for item in self._outputs
        ]
        for position in self._own:
            if outputs[position].requires_grad:
                outputs[position] = copied(outputs[position])
        return tuple(outputs)

    def _other_output(self, item: Any, args: Sequence[Any]) -> Any:
        if type(item) is Size:
            return evaluate(item.text, self._varying.values(args))
        return item.value if type(item) is Constant else item

    def _strides(self, region: Region, args: Sequence[Any]) -> list[tuple[int, ...]]:
        values = self._varying.values(args)
        return [sizes(strides, values) for strides in region.strides]


class StaleError(Exception):
    """Kernels do not fit a body any more."""


class _Given:
    """What a kernel is given for a body: alpha, gate, then the body's tensors, of the kinds that it was compiled for."""

    def __init__(self, inputs: Callable[[], list[Tensor]], metas: Sequence[TensorMeta]) -> None:
        self.inputs = inputs
        self._kinds = [(meta.dtype, meta.requires_grad) for meta in metas]

    def current(self, inputs: Sequence[Tensor]) -> bool:
        """Whether these tensors are of those kinds."""
        return [(tensor.dtype, tensor.requires_grad) for tensor in inputs[2:]] == self._kinds

    def checked(self) -> list[Tensor]:
        """The tensors as they are now; raises StaleError if one is of another kind."""
        inputs = self.inputs()
        if not self.current(inputs):
            raise StaleError
        return inputs


def _given(seed: KasminaSeed | None, body: BodyGraph | None) -> _Given:
    assert seed is not None
    assert body is not None
    return _Given(seed.kernel_inputs(), body.tensors)


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a program runs, or will; made beside the training, so that a step boundary only has to put it in its place.

    Attributes:
        plan: Name of the plan.
        bodies: For each seed of the program its body, or None.
        variants: What its kernels are of.
        executable: What a step calls.
        complete: Whether the kernels of all plans for these bodies were there, so that there is nothing left to ask for.
    """

    plan: str
    bodies: tuple[nn.Module | None, ...]
    variants: tuple[Variant, ...]
    executable: Executable
    complete: bool

    def has(self, bodies: Sequence[nn.Module | None]) -> bool:
        """Whether it is made for these bodies, as they are now."""
        return len(bodies) == len(self.bodies) and all(map(is_, bodies, self.bodies)) and self.executable.current
