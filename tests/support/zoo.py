"""Models of all kinds that people write, each with inputs and what morphing is told and must say of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.support.zoo_habits import (
    AsList,
    Children,
    Features,
    NoneAtTimes,
    OwnCall,
    Past,
    Selves,
    Sliced,
    Stages,
    Vectorized,
    Words,
    Wrapper,
    replaced_forward,
)
from tests.support.zoo_python import (
    Answers,
    BorrowedFunction,
    Depends,
    Joins,
    Keywords,
    OwnFunction,
    OwnGradient,
    Recurrent,
    Several,
    Splits,
)
from tests.support.zoo_structures import (
    Averages,
    Containers,
    MixedPrecision,
    Recomputes,
    Repeated,
    Replaces,
    Tied,
    chain,
    hooked,
    parametrized,
)

Calls = tuple[tuple[Any, ...], dict[str, Any]]


def vectors(seed: int) -> Calls:
    """One random input [3, 4] that needs a gradient."""
    return (torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_(),), {}


def tokens(seed: int) -> Calls:
    """One random input [3, 5, 4] that needs a gradient."""
    return (torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_(),), {}


@dataclass(frozen=True)
class Kind:
    """A model of some kind.

    Attributes:
        build: Makes it.
        sites: What is asked of `morph`.
        python: Modules whose forward must stay Python or be called as a whole, each with a word of the reason.
        inputs: Arguments for a call, random by the seed.
    """

    build: Callable[[], nn.Module]
    sites: Any
    python: Mapping[str, str] = field(default_factory=dict)
    inputs: Callable[[int], Calls] = vectors


def keywords(seed: int) -> Calls:
    """One positional argument and two keyword arguments."""
    args, _ = vectors(seed)
    return args, {"shift": torch.full((4,), 0.5).requires_grad_(), "factor": 2.0}


WHOLE = {"1": "parametrized"}
FROM_PYTHON = {"": "control flow", "part": "control flow"}

KINDS: dict[str, Kind] = {
    "tied weights": Kind(Tied, ["embed", "head"]),
    "called several times": Kind(Repeated, ["block", "block.0"]),
    "weight norm": Kind(lambda: chain(parametrizations.weight_norm(nn.Linear(4, 4))), ["1", "2"], WHOLE),
    "spectral norm": Kind(lambda: chain(parametrizations.spectral_norm(nn.Linear(4, 4))), ["1", "2"], WHOLE),
    "orthogonal": Kind(lambda: chain(parametrizations.orthogonal(nn.Linear(4, 4))), ["1", "2"], WHOLE),
    "parametrized module": Kind(parametrized, ["1", "1.inner"], WHOLE),
    "hooks of a part": Kind(lambda: hooked(root=False), ["1", "1.0"], {"1": "hooks"}),
    "hooks of the model": Kind(lambda: hooked(root=True), ["1", "1.0"]),
    "buffers changed in place": Kind(lambda: chain(nn.Sequential(Averages(), nn.BatchNorm1d(4))), ["1", "1.0"]),
    "buffers replaced": Kind(lambda: chain(Replaces()), ["1", "1.inner"], {"1": "assigns to an attribute"}),
    "containers": Kind(Containers, ["stages.*.a", "stages.*.b", "stages.0.b.1", "head.0.0"]),
    "recomputes": Kind(
        lambda: Recomputes(False), ["blocks.0", "blocks.1.1", "blocks.2"], {"": "torch.utils.checkpoint"}
    ),
    "recomputes, reentrant": Kind(lambda: Recomputes(True), ["blocks.1", "blocks.2"], {"": "torch.utils.checkpoint"}),
    "mixed precision": Kind(MixedPrecision, ["first", "middle", "middle.1"]),
    "tuple": Kind(lambda: Joins(Splits(tuple, True)), "part"),
    "list": Kind(lambda: Joins(Splits(list, True)), "part"),
    "named tuple": Kind(lambda: Joins(Splits(Several, True)), "part"),
    "tuple from Python": Kind(lambda: Joins(Splits(tuple, False)), "part", FROM_PYTHON),
    "list from Python": Kind(lambda: Joins(Splits(list, False)), "part", FROM_PYTHON),
    "named tuple from Python": Kind(lambda: Joins(Splits(Several, False)), "part", FROM_PYTHON),
    "recurrent": Kind(Recurrent, ["lstm", "last"], inputs=tokens),
    "depends on values": Kind(Depends, ["one", "other"], {"": "control flow"}),
    "keyword arguments": Kind(Keywords, ["part", "last"], {"": ""}, keywords),
    "dataclasses": Kind(Answers, ["part.layer", "last"]),
    "own gradient": Kind(lambda: chain(OwnGradient()), ["1", "1.inner"], {"1": "custom autograd function"}),
    "own gradient by another name": Kind(
        lambda: chain(nn.Sequential(OwnFunction(), BorrowedFunction())),
        ["1.0", "1.0.inner", "1.1.inner"],
        {"1.0": "custom autograd function", "1.1": "custom autograd function"},
    ),
    "a Sequential as a list": Kind(
        AsList, ["blocks.*", "last"], {"": "control flow", "blocks": "called by code outside of it"}
    ),
    "parts of a part": Kind(
        Past, ["backbone", "backbone.*"], {"": "control flow", "backbone": "called by code outside of it"}
    ),
    "a slice of a Sequential": Kind(
        Sliced, ["blocks", "blocks.1"], {"": "not installed", "blocks": "called by code outside of it"}
    ),
    "a Sequential with a forward": Kind(Stages, ["0", "1"], {"": "self.training"}),
    "a ModuleDict with a forward": Kind(Features, ["stem", "body"], {"": "OrderedDict"}),
    "all parts in turn": Kind(Children, ["first", "second"], {"": "assigns to an attribute"}),
    "words of the language": Kind(Words, ["class", "self", "not"], {"": "cannot spell"}),
    "a part named self": Kind(Selves, ["self", "output"]),
    "a wrapper": Kind(Wrapper, ["wrapped.*"], {"": ""}),
    "own call": Kind(
        lambda: chain(OwnCall()), ["1", "1.layer"], {"": "__call__ of its own", "1": "__call__ of its own"}
    ),
    "own call of the model": Kind(OwnCall, ["layer"], {"": "__call__ of its own"}),
    "forward replaced": Kind(replaced_forward, ["1", "1.layer"], {"1": "in place of its class's"}),
    "forward of the model replaced": Kind(
        lambda: replaced_forward()[1],
        ["layer"],
        {"": "in place of its class's"},  # type: ignore[index]
    ),
    "nothing at times": Kind(NoneAtTimes, ["part", "part.layer"], {"": "is None", "part": "self.training"}),
    "in torch.vmap": Kind(Vectorized, ["first", "last"], {"": ""}),
}
