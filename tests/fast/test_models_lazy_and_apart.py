"""Models whose parameters have no shape yet, and models on several devices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import esper_fx
from esper_fx import ops
from esper_fx.errors import MorphError
from tests.support.networks import assert_same, run

# Lazy layers.


def lazy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyBatchNorm1d(), nn.LazyLinear(3))


@pytest.mark.parametrize("given", [None, (torch.randn(2, 5),)])
@pytest.mark.parametrize("sites", ["0", "auto"])
def test_before_the_first_call_there_is_nothing_to_morph(given: tuple[Tensor, ...] | None, sites: str) -> None:
    net = lazy()
    wording = (
        r"Sequential has parameters without a shape yet \(0\.weight, 0\.bias, 2\.weight\): call the model once before"
    )
    with pytest.raises(MorphError, match=wording):
        esper_fx.morph(net, sites=sites, example_inputs=given)
    assert isinstance(net[0], nn.LazyLinear)
    assert net(torch.randn(2, 5)).shape == (2, 3)


def test_after_it_they_are_layers_like_others() -> None:
    net = lazy()
    x = torch.randn(6, 5)
    net(x)
    other = copy.deepcopy(net)
    model = esper_fx.morph(net, sites=["0", "3"], example_inputs=(x,))
    for side in (model, other):
        side.train()
    found, expected = run(model, x), run(other, x)
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])
    assert_same(dict(net.named_buffers()), dict(other.named_buffers()))
    seed = model.seeds["0"]
    assert seed.site.source is not None
    seed.germinate("affine", weights={"scale": torch.zeros(4), "shift": torch.ones(4)})
    model.eval(), net.eval()
    torch.testing.assert_close(model(x), net[3](net[2](net[1](net[0](x) + 1))))
    assert_same([esper_fx.unmorph(model)(x)], [model(x)])


# Several devices. There is one that every machine has besides its processor, on which nothing is computed: "meta".


class Apart(nn.Module):
    """Its second layer is on another device, and its result comes back."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, device=first)
        self.second = nn.Linear(4, 4, device=second)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.to(self.first.weight.device))
        return self.second(y.to(self.second.weight.device))  # type: ignore[no-any-return]


@pytest.mark.parametrize("devices", [("cpu", "meta"), ("meta", "cpu")])
def test_a_body_is_on_the_device_of_its_site(devices: tuple[str, str]) -> None:
    if devices[0] == "meta":

        class Reversed(Apart):
            def forward(self, x: Tensor) -> Tensor:
                y = self.second(x)
                return self.first(y.to(self.first.weight.device))  # type: ignore[no-any-return]

        net: nn.Module = Reversed(*devices)
    else:
        net = Apart(*devices)
    x = torch.randn(2, 4)
    model = esper_fx.morph(net, sites="*", example_inputs=(x,))
    assert {tensor.device.type for tensor in model.state.buffers()} == {"cpu"}
    for name, device in zip(("first", "second"), devices, strict=True):
        seed = model.seeds[name]
        assert seed.site.device.type == device
        seed.germinate("low_rank", rank=2)
        assert seed.body is not None
        assert {parameter.device.type for parameter in seed.body.parameters()} == {device}
        seed.blend(to=0.5, steps=2)
    for module in (model, copy.deepcopy(model)):
        result = module(x)
        assert result.device.type == "meta"
    assert esper_fx.unmorph(model)(x).device.type == "meta"
    for seed in model.seeds.values():
        seed.prune()
    assert model(x).device.type == "meta"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_alpha_and_gate_come_to_the_value(device: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, 4, device=device)
        alpha, gate = torch.full((5,), 0.5)[2].clone(), torch.ones(5)[2].clone()
        result = ops.seed_forward(x, torch.sin, alpha, gate)
    assert result.device.type == device


def test_a_kernel_takes_alpha_and_gate_where_its_body_is() -> None:
    model = esper_fx.morph(Apart("cpu", "meta"), sites="*", example_inputs=(torch.randn(2, 4),))
    for name in ("first", "second"):
        seed = model.seeds[name]
        seed.germinate("affine")
        inputs = seed.kernel_inputs()
        for _ in range(2):  # while alpha may move, and when it stands still
            assert {tensor.device.type for tensor in inputs()} == {seed.site.device.type}
            model.growth.scheduled = not model.growth.scheduled
