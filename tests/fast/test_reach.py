"""Whoever calls a part of a part, its seeds are on the way: what is reached into is not traced as one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx.errors import SiteError
from esper_fx.passes.reach import is_reached_into
from esper_fx.passes.trace_report import How
from tests.support.zoo_habits import AsList, Backbone, Block, ByName, Past, pruned


class Straight(nn.Module):
    """Calls its Sequentials as they are, where they are there; stays Python."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.shortcut = nn.Sequential(Block())
        self.backbone = Backbone()

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is not None and x.sum() < 1e9:
            x = self.shortcut(x)
        blocks = self.blocks(x)
        return self.backbone(blocks)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "part", "expected"),
    [
        (AsList, "blocks", True),
        (Past, "backbone", True),
        (ByName, "backbone", False),
        (Straight, "blocks", False),
        (Straight, "shortcut", False),
        (Straight, "backbone", False),
    ],
)
def test_code_that_reaches_into_a_part_is_told_from_code_that_calls_it(
    kind: type[nn.Module], part: str, expected: bool
) -> None:
    assert is_reached_into(kind().get_submodule(part), part, [kind]) is expected


def test_a_part_that_is_only_called_is_traced_as_one() -> None:
    model = esper_fx.morph(Straight(), sites="**")
    report = {entry.name: entry.how for entry in model.trace_report()}
    assert {report[part] for part in ("blocks", "shortcut", "backbone")} == {How.TRACED}


@pytest.mark.parametrize("kind", [AsList, Past])
def test_a_seed_in_a_part_that_is_reached_into_counts(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net, x = kind(), torch.randn(2, 4)
    model = esper_fx.morph(net, sites=["blocks.*", "backbone.*"])
    model(x)
    for seed in model.seeds.values():
        assert seed.site.shape == (2, 4)
        seed.germinate("affine", weights={"scale": torch.zeros(4), "shift": torch.ones(4)})
        assert not torch.equal(model(x), net(x))
        seed.prune()
        assert torch.equal(model(x), net(x))


def test_where_the_code_does_not_tell_example_inputs_do() -> None:
    torch.manual_seed(0)
    net, x = ByName(), torch.randn(2, 4)
    model = esper_fx.morph(net, sites="backbone.*")
    model(x)
    with pytest.raises(SiteError, match=r"nothing is known of site 'backbone\.stem' yet"):
        _ = model.seeds["backbone.stem"].site
    model = esper_fx.morph(net, sites="backbone.*", example_inputs=(x,))
    assert {name: seed.site.shape for name, seed in model.seeds.items()} == {
        "backbone.stem": (2, 4),
        "backbone.body": (2, 4),
    }
    assert torch.equal(model(x), net(x))
    model.seeds["backbone.stem"].germinate("affine", weights={"scale": torch.zeros(4), "shift": torch.ones(4)})
    assert torch.allclose(model(x), net.last(net.backbone.body(net.backbone.stem(x) + 1)))


class NeverCalled(ByName):
    """Has a part that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = Backbone()


def test_a_part_that_is_not_called_stays_unknown_and_as_it_was() -> None:
    x = torch.randn(2, 4)
    model = esper_fx.morph(NeverCalled(), sites=["backbone.*", "spare.*"], example_inputs=(x,))
    report = {entry.name: entry.how for entry in model.trace_report()}
    assert (report["backbone"], report["spare"]) == (How.PYTHON, How.TRACED)
    with pytest.raises(SiteError, match=r"nothing is known of site 'spare\.stem' yet"):
        _ = model.seeds["spare.stem"].site


def test_a_part_compiled_by_torchscript_is_called_and_shared() -> None:
    torch.manual_seed(0)
    scripted = torch.jit.script(Block())
    for around in (nn.Sequential, AsIs):
        net = around(nn.Linear(4, 4), scripted, nn.Linear(4, 4))
        model = esper_fx.morph(net, sites="**", example_inputs=(torch.randn(2, 4),))
        assert {"0", "2"} <= set(model.seeds)
        x = torch.randn(2, 4)
        assert torch.equal(model(x), net(x))
        assert model.get_submodule("1") is scripted
        seed = model.seeds["2"]
        seed.germinate("affine", weights={"scale": torch.zeros(4), "shift": torch.ones(4)})
        assert torch.allclose(model(x), net(x) + 1)
        assert torch.equal(esper_fx.unmorph(model)(x), model(x))


class AsIs(nn.Sequential):
    """Stays Python."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x) if x.sum() < 1e9 else x
        return x


def test_a_weight_that_a_hook_computes_anew_is_no_obstacle() -> None:
    net, x = pruned(), torch.randn(2, 4)
    model = esper_fx.morph(net, sites="*", example_inputs=(x,))
    assert torch.equal(model(x), net(x))

    class ByValue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = pruned()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if float(x.sum()) < 1e9 else x  # type: ignore[no-any-return]

    other = ByValue()
    model = esper_fx.morph(other, sites="inner.*", example_inputs=(x,))  # it is called for real
    assert model.seeds["inner.1"].site.shape == (2, 4)
    assert torch.equal(model(x), other(x))


def test_a_class_that_is_called_by_its_own_modules_makes_what_it_always_has() -> None:
    class Grows(Block):
        def again(self) -> nn.Module:
            return type(self)()

    for net in (nn.Sequential(nn.Linear(4, 4), Grows()), AsIs(nn.Linear(4, 4), Grows())):
        model = esper_fx.morph(net, sites=["1", "1.layer"], example_inputs=(torch.randn(2, 4),))
        again = model.get_submodule("1").again()  # type: ignore[operator]
        assert type(again) is Grows
        assert again(torch.ones(1, 4)).shape == (1, 4)
        assert type(copy.deepcopy(model).get_submodule("1")) is type(model.get_submodule("1"))
