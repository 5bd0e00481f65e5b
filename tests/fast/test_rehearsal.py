"""Learning what flows through the sites computes nothing, and leaves nothing behind in classes, files and caches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx._torch import FakeTensor
from esper_fx.passes.effects import holds

MASKS: dict[int, Tensor] = {}
NESTED: dict[str, dict[int, tuple[Tensor, str]]] = {"masks": {}}
SHAPES: list[tuple[int, ...]] = []
mask: Tensor | None = None


def lower(size: int) -> Tensor:
    """A triangle of ones."""
    return torch.tril(torch.ones(size, size))


cached = functools.lru_cache(maxsize=4)(lower)
kept_for_good = functools.cache(lambda size: {"mask": lower(size)})


def hidden() -> Callable[[int], Tensor]:
    """A cache that only a closure holds."""
    inside = functools.lru_cache(maxsize=None)(lower)

    def find(size: int) -> Tensor:
        return inside(size)

    return find


behind_a_closure = hidden()


class Masked(nn.Module):
    """Mixes positions by a mask that it has made earlier, if it has."""

    table: ClassVar[dict[int, Tensor]] = {}

    def __init__(self, find: Callable[[Any, int], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.find = [find]
        self.kinds: list[type] = []

    def forward(self, x: Tensor) -> Tensor:
        SHAPES.append(tuple(x.shape))
        self.kinds.append(type(x))
        return self.last(self.find[0](self, x.shape[1]) @ torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def in_a_dict(_: Masked, size: int) -> Tensor:
    return MASKS.setdefault(size, lower(size))


def in_a_dict_inside(_: Masked, size: int) -> Tensor:
    return NESTED["masks"].setdefault(size, (lower(size), "mask"))[0]


def in_the_class(net: Masked, size: int) -> Tensor:
    return net.table.setdefault(size, lower(size))


def in_a_variable(_: Masked, size: int) -> Tensor:
    global mask  # noqa: PLW0603
    mask = lower(size) if mask is None else mask
    return mask


WAYS = {
    "a dict": in_a_dict,
    "a dict in a dict": in_a_dict_inside,
    "the class": in_the_class,
    "a variable": in_a_variable,
    "a cache": lambda _, size: cached(size),
    "a cache without bounds": lambda _, size: kept_for_good(size)["mask"],
    "a cache behind a closure": lambda _, size: behind_a_closure(size),
}


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> None:
    global mask  # noqa: PLW0603
    MASKS.clear(), NESTED["masks"].clear(), Masked.table.clear(), cached.cache_clear(), kept_for_good.cache_clear()
    mask = None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sites", ["*", "auto"])
def test_what_a_forward_remembers_outside_of_the_model_is_not_made_of_fakes(way: str, sites: str) -> None:
    torch.manual_seed(0)
    net, x = Masked(WAYS[way]), torch.randn(2, 3, 4)
    MASKS[7] = before = lower(7)
    model = esper_fx.morph(net, sites=sites, example_inputs=(x,))
    assert model.seeds["first"].site.shape == (2, 3, 4)
    assert not holds((MASKS, NESTED, Masked.table, mask), lambda value: isinstance(value, FakeTensor))
    assert {7: before} == MASKS
    assert torch.equal(model(x), net(x))
    assert type(model(x)) is Tensor


def test_what_was_remembered_before_is_used_and_stays() -> None:
    before = cached(3)
    esper_fx.morph(Masked(WAYS["a cache"]), sites="*", example_inputs=(torch.randn(2, 3, 4),))
    assert cached(3) is before


class Notes(nn.Module):
    """Notes what kind of tensors it is called with, in a list that its copies share."""

    def __init__(self, kinds: list[type]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.note = kinds.append

    def forward(self, x: Tensor) -> Tensor:
        self.note(type(x))
        self.get_buffer("calls").add_(1)
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("sites", ["*.layer", "auto"])
def test_nothing_is_computed(sites: str) -> None:
    kinds: list[type] = []
    net = nn.Sequential(nn.Linear(4, 4), Notes(kinds), nn.Tanh(), Notes(kinds), nn.Linear(4, 4))
    model = esper_fx.morph(net, sites=sites, example_inputs=(torch.randn(2, 4),))
    assert set(kinds) == {FakeTensor}
    assert all(seed.site.shape == (2, 4) for seed in model.seeds.values())
    assert [float(buffer) for name, buffer in model.named_buffers() if name.endswith("calls")] == [0.0, 0.0]
    assert model.clock == 0
