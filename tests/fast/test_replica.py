"""Replicas of module trees: what copy.deepcopy makes, but for the tensors, which are shared."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from esper_fx.morphing.replica import replica


class Odd(nn.Module):
    """Attributes of all kinds, some of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.same = self.layer
        self.by_name = {"layer": self.layer, "weight": self.layer.weight, "more": [self.layer, {}]}
        self.in_order = OrderedDict(a=1, b=self.by_name)
        self.pairs = [(self.layer, self.layer.bias)]
        self.empty: set[str] = set()
        self.also_empty = self.empty
        self.constant = torch.ones(2)
        self.layer.weight.note = "kept"  # type: ignore[attr-defined]


class Wary(nn.Module):
    """Says itself how it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Wary:
        twin = Wary()
        twin.copied = True  # type: ignore[assignment]
        return twin


class Slotted(nn.Module):
    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "extra", [1, 2])


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].register_forward_hook(print)
    return net


def seen(value: Any, numbers: dict[int, int], alive: list[Any], shared: bool) -> Any:
    """A description of all that is reached from a value: kinds, contents, and what is the same object as what."""
    if id(value) in numbers and not isinstance(value, bool | int | str | None):
        return numbers[id(value)]
    numbers[id(value)] = len(numbers)
    alive.append(value)
    if isinstance(value, torch.Tensor):
        return ("tensor", id(value) if shared else 0)
    if isinstance(value, nn.Module):
        state = dict(vars(value))
        more = getattr(value, "extra", None) if isinstance(value, Slotted) else None
        return (type(value), seen(state, numbers, alive, shared), more)
    if isinstance(value, dict):
        return (type(value), [(key, seen(item, numbers, alive, shared)) for key, item in value.items()])
    if isinstance(value, list | tuple | set):
        return (type(value), [seen(item, numbers, alive, shared) for item in value])
    return (type(value), value if isinstance(value, bool | int | float | str | None) else "")


NETS = {
    "odd": Odd,
    "wary": lambda: nn.Sequential(Wary(), nn.ReLU()),
    "slots": lambda: nn.Sequential(Slotted()),
    "hooks": hooked,
    "recurrent": lambda: nn.LSTM(2, 3, num_layers=2),
    "parametrized": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 3))),
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 2),
    "large": lambda: nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(200)]),
}


@pytest.mark.parametrize("name", NETS)
def test_a_replica_is_what_deepcopy_makes(name: str) -> None:
    net = NETS[name]()
    mine, theirs = replica(net), copy.deepcopy(net)
    assert seen(mine, {}, [], False) == seen(theirs, {}, [], False)
    modules = set(map(id, net.modules()))
    assert not any(id(module) in modules for module in mine.modules())


@pytest.mark.parametrize("name", ["odd", "recurrent", "transformer", "large"])
def test_a_replica_shares_every_tensor(name: str) -> None:
    net = NETS[name]()
    mine = replica(net)
    for tensors in (lambda n: n.named_parameters(remove_duplicate=False), lambda n: n.named_buffers()):
        assert [(key, id(tensor)) for key, tensor in tensors(mine)] == [
            (key, id(tensor)) for key, tensor in tensors(net)
        ]
    if isinstance(mine, Odd):
        assert mine.constant is net.constant
        assert mine.by_name["weight"] is mine.layer.weight is net.layer.weight
        assert mine.by_name["layer"] is mine.same is mine.layer
        assert mine.empty is mine.also_empty
