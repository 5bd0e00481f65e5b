"""Programs whose sizes vary from call to call, and whether what was compiled for some sizes holds for others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from esper_fx.passes.carry_sizes import SizesError
from esper_fx.passes.metas import Size, Symbols, TensorMeta, evaluate, sizes

if TYPE_CHECKING:
    from esper_fx.engine.plan import Plan
    from esper_fx.passes.record import BodyGraph

#: So many combinations of sizes are remembered to be fine, before all are forgotten.
MAX_KNOWN = 4096


@dataclass(frozen=True)
class Varying:
    """How a program's sizes are made of its integer inputs.

    Attributes:
        places: For each name in its sizes the position of the input that it stands for.
        guards: What has to be true of these.
        slots: For each seed what the names in the sizes at its site are called in the program.
        numbers: For the position of each tensor input that holds a number what that has to be.
    """

    places: Mapping[str, int]
    guards: tuple[str, ...] = ()
    slots: tuple[Mapping[str, str], ...] = ()
    numbers: Mapping[int, float] = field(default_factory=dict)

    def values(self, args: Sequence[Any]) -> dict[str, int]:
        """The names and what they are in a call."""
        return {name: args[place] for name, place in self.places.items()}


#: That of a program with fixed sizes.
FIXED = Varying({})


def fake_inputs(
    module: fx.GraphModule, args: Sequence[Any], *, vary: bool
) -> tuple[Symbols, list[Any], dict[str, int]]:
    """Inputs of a program to annotate it with.

    Args:
        module: A graph that Dynamo has made.
        args: What it is called with.
        vary: Whether its sizes are to be made of symbolic integers, where Dynamo's are, instead of being those of this call.

    Returns:
        The symbolic integers, with the mode of fake tensors; the inputs; for each symbolic integer its place among these.

    Raises:
        SizesError: It has inputs of which too little is known for all sizes.
    """
    if not vary:
        symbols = Symbols({})
        with symbols.active():
            return symbols, [TensorMeta.of(arg).empty() if isinstance(arg, Tensor) else arg for arg in args], {}
    values = [node.meta.get("example_value") for node in module.graph.nodes if node.op == "placeholder"]
    places: dict[str, int] = {}
    names: dict[str, str] = {}
    for place, (value, arg) in enumerate(zip(values, args, strict=True)):
        if not isinstance(arg, Tensor):
            name = f"size{len(places)}"
            names[_symbol(value, arg)] = name
            places[name] = place
    symbols = Symbols({name: args[place] for name, place in places.items()})
    metas = [_meta(v, arg, names) if isinstance(arg, Tensor) else None for v, arg in zip(values, args, strict=True)]
    _check(metas, args, {name: args[place] for name, place in places.items()})
    integers = {place: symbols.given[name] for name, place in places.items()}
    with symbols.active():
        inputs = [integers[i] if meta is None else meta.empty(symbols.given) for i, meta in enumerate(metas)]
    return symbols, inputs, places


def _symbol(value: Any, arg: Any) -> str:
    """Dynamo's name for an integer input."""
    size = Size.of(value)
    if not (isinstance(arg, int) and isinstance(size, Size) and size.text == size.names[0][0]):
        raise SizesError(f"an input is {arg!r}, and Dynamo has no name for it")
    if arg < 2:
        raise SizesError(f"an input is {arg}, which may be an exception among sizes")
    return size.text


def _meta(value: Any, arg: Tensor, names: Mapping[str, str]) -> TensorMeta:
    """What an input tensor is, with the sizes that Dynamo knows of it."""
    if not isinstance(value, Tensor):
        raise SizesError("Dynamo knows no sizes of an input tensor")
    known = TensorMeta.of(value)
    unknown = known.names.keys() - names.keys()
    if unknown:
        raise SizesError(f"an input tensor has sizes that no integer input tells: {sorted(unknown)}")
    known = known.renamed(names)
    return TensorMeta(known.shape, known.stride, arg.dtype, arg.device, arg.requires_grad)


def _check(metas: Sequence[TensorMeta | None], args: Sequence[Any], values: Mapping[str, int]) -> None:
    for meta, arg in zip(metas, args, strict=True):
        if meta is not None and (sizes(meta.shape, values), sizes(meta.stride, values)) != (arg.shape, arg.stride()):
            raise SizesError(f"an input tensor of shape {tuple(arg.shape)} is not what Dynamo says that it is")


class Guards:
    """Whether a plan with these kernels and bodies is right for the sizes of a call.

    Args:
        plan: The plan.
        kernels: For each of its regions the kernel.
        assignment: For each slot of the program what its body was recorded as.
    """

    def __init__(self, plan: Plan, kernels: Sequence[Any], assignment: Sequence[BodyGraph | None]) -> None:
        places = plan.varying.places
        self._sizes = tuple(places.values())
        self._numbers = tuple((place, repr(number)) for place, number in plan.varying.numbers.items())
        self._known: dict[tuple[int, ...], bool] = {}
        self._guards: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()
        if not places:
            return
        guards = dict.fromkeys((text, tuple(places.items())) for text in plan.varying.guards)
        for region, kernel in zip(plan.regions, kernels, strict=True):
            guards |= dict.fromkeys((text, tuple(region.sizes.items())) for text in getattr(kernel, "guards", ()))
        for body, names in zip(assignment, plan.varying.slots, strict=False):
            if body is not None:
                known = tuple((name, places[theirs]) for name, theirs in names.items())
                guards |= dict.fromkeys((text, known) for text in body.guards)
        self._guards = tuple(guards)

    def hold(self, args: Sequence[Any]) -> bool:
        """Whether it is, for the call with these inputs."""
        if not self._sizes:
            return True
        if any(repr(args[place].item()) != number for place, number in self._numbers):
            return False
        given = tuple(args[place] for place in self._sizes)
        known = self._known.get(given)
        if known is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            known = self._known[given] = min(given) >= 2 and all(self._holds(args))
        return known

    def _holds(self, args: Sequence[Any]) -> Iterator[bool]:
        for text, places in self._guards:
            try:
                yield bool(evaluate(text, {name: args[place] for name, place in places}))
            except ArithmeticError:  # a division by what is 0 for such sizes
                yield False
