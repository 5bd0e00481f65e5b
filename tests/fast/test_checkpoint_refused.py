"""A checkpoint that does not fit changes nothing, and the message says why; one of the bare network always fits."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx.blueprints import registry
from esper_fx.errors import CheckpointError
from tests.support.checkpoints import checkpoint_of, grown, grown_otherwise, identities, refused
from tests.support.training import Net, Training, assert_same, carried, copied, growth_of

# An old checkpoint of the bare network.


@pytest.mark.parametrize("make", [Training, grown])
def test_a_checkpoint_of_the_bare_network_loads_and_leaves_growth_alone(make: Callable[[], Training]) -> None:
    torch.manual_seed(5)
    net, run = Net(), make()
    before, who = growth_of(run.model), identities(run)
    bodies = copied({key: value for key, value in run.model.state_dict().items() if key.startswith("esper.")})
    assert str(run.model.load_state_dict(carried(net.state_dict()))) == "<All keys matched successfully>"
    after = run.model.state_dict()
    assert_same(copied({key: after[key] for key in net.state_dict()}), copied(dict(net.state_dict())))
    assert_same(copied({key: value for key, value in after.items() if key.startswith("esper.")}), bodies)
    assert_same(growth_of(run.model), before)
    assert identities(run) == who


def test_a_truncated_checkpoint_of_the_bare_network_changes_nothing() -> None:
    run = grown()
    for key in Net().state_dict():
        saved = carried(Net().state_dict())
        del saved[key]
        assert key in refused(run, saved, "nothing of it was loaded")


# What does not fit.


def test_without_any_one_of_its_keys_a_checkpoint_changes_nothing() -> None:
    run, saved = grown_otherwise(), checkpoint_of(grown().model)
    for key in saved:
        truncated = copy.copy(saved)
        truncated._metadata = saved._metadata  # type: ignore[attr-defined]
        del truncated[key]
        assert key in refused(run, truncated, "nothing of it was loaded")


def test_with_any_one_tensor_of_another_shape_a_checkpoint_changes_nothing() -> None:
    run, saved = grown_otherwise(), checkpoint_of(grown().model)
    for key, value in saved.items():
        altered = copy.copy(saved)
        altered[key] = torch.zeros([size + 1 for size in value.shape] or [2], dtype=value.dtype)
        message = refused(run, altered, "nothing of it was loaded|cannot be read")
        assert key.removeprefix("esper.") in message
        refused(run, altered, "nothing of it was loaded|cannot be read", strict=False)


def test_a_key_that_is_not_the_models_is_named() -> None:
    saved = checkpoint_of(grown().model)
    saved["d.weight"] = torch.zeros(2)
    saved["esper.seeds.c.body.scale"] = torch.zeros(3)
    message = refused(grown_otherwise(), saved, "nothing of it was loaded")
    assert 'Unexpected key(s) in state_dict: "d.weight", "esper.seeds.c.body.scale"' in message


def test_a_checkpoint_of_something_else_changes_nothing() -> None:
    refused(grown_otherwise(), dict(nn.Linear(2, 2).state_dict()), r'Missing key\(s\) in state_dict: "a.weight"')


def test_a_checkpoint_of_other_sites_is_refused_with_the_differences() -> None:
    net = nn.Sequential(OrderedDict(Net().named_children()))
    other = esper_fx.morph(net, sites=["b", "norm"], example_inputs=(torch.zeros(8, 4),))
    message = refused(grown(), checkpoint_of(other), "a model with other sites")
    assert "only in the checkpoint: 'norm'; only in this model: 'a', 'c'" in message
    assert "leave out the keys that begin with 'esper'" in message
    hosts = {key: value for key, value in checkpoint_of(other).items() if not key.startswith("esper.")}
    assert str(grown().model.load_state_dict(hosts)) == "<All keys matched successfully>"


def test_the_same_sites_in_another_order_are_refused() -> None:
    class Backwards(Net):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(self.c(self.b(x)))
            return y

    net = Backwards()
    net.a, net.c = nn.Linear(3, 6), nn.Linear(4, 3)
    other = esper_fx.morph(net, sites=["a", "b", "c"])
    refused(grown(), checkpoint_of(other), "in another order: 'b', 'c', 'a'; this model: 'a', 'b', 'c'")


def test_a_blueprint_that_is_not_registered_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    @esper_fx.blueprint("test_checkpoint_mine", replace=True)
    def mine(site: esper_fx.SiteSpec) -> nn.Module:
        return nn.Sequential(nn.Linear(site.features, site.features)).apply(
            lambda m: [nn.init.zeros_(p) for p in m.parameters()]
        )

    run = Training()
    run.live([("germinate", "b", ("test_checkpoint_mine", {}))])
    saved = checkpoint_of(run.model)
    monkeypatch.delitem(registry._REGISTRY, "test_checkpoint_mine")
    message = refused(grown_otherwise(), saved, "no blueprint is registered under 'test_checkpoint_mine'")
    assert "at site 'b' cannot be built here" in message
    assert "must be registered before a checkpoint is loaded" in message


def test_a_config_that_the_blueprint_no_longer_takes_is_named() -> None:
    @esper_fx.blueprint("test_checkpoint_changing", replace=True)
    def before(site: esper_fx.SiteSpec, *, width: int = 2) -> nn.Module:
        return registry.get("bottleneck").function(site, width=width)

    run = Training()
    run.live([("germinate", "b", ("test_checkpoint_changing", {"width": 3}))])
    saved = checkpoint_of(run.model)

    @esper_fx.blueprint("test_checkpoint_changing", replace=True)
    def after(site: esper_fx.SiteSpec, *, hidden: int = 2) -> nn.Module:
        return registry.get("bottleneck").function(site, width=hidden)

    refused(grown_otherwise(), saved, r"'test_checkpoint_changing' has no parameter 'width' \(given width=3\)")


def test_a_state_dict_that_was_held_while_training_went_on_is_refused() -> None:
    run = Training()
    held = run.model.state_dict()
    run.live([("germinate", "b", ("affine", {})), ("train", 1)])
    message = refused(grown_otherwise(), held, "contradicts itself")
    assert "the seed at 'b' is INCUBATING by its state arrays, DORMANT or EMBARGOED by its manifest" in message
    assert "copy.deepcopy()" in message


def test_the_branch_cannot_be_loaded_by_itself() -> None:
    run = grown()
    saved = checkpoint_of(run.model)
    run.model.load_state_dict(saved)
    mine = {key.removeprefix("esper."): value for key, value in saved.items() if key.startswith("esper.")}
    with pytest.raises(CheckpointError, match="'esper' cannot be loaded by itself"):
        run.model.get_submodule("esper").load_state_dict(mine)


@pytest.mark.parametrize("value", [nn.ReLU, torch.float32, 1j, {"deep": [object()]}])
def test_a_config_that_cannot_be_saved_is_named(value: Any) -> None:
    @esper_fx.blueprint("test_checkpoint_unsaved", replace=True)
    def unsaved(site: esper_fx.SiteSpec, *, act: Any = None) -> nn.Module:
        return registry.get("affine").function(site)

    run = Training()
    run.model.growth.by_index[1].germinate("test_checkpoint_unsaved", act=[1]).seed.config["act"] = value
    with pytest.raises(CheckpointError) as caught:
        run.model.state_dict()
    assert "the seed at 'b' cannot be saved: parameter 'act' of blueprint 'test_checkpoint_unsaved' is " in str(
        caught.value
    )
    run.live([("train", 1)])  # training goes on
