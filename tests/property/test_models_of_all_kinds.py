"""Whatever a model is made of: morphed it behaves as before to the bit, grows, prunes back, and can be had back plain."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx.lifecycle import Stage
from esper_fx.passes.trace_report import How
from tests.support.networks import assert_same
from tests.support.zoo import KINDS, Calls

pytestmark = pytest.mark.parametrize("name", KINDS)


def made(name: str) -> tuple[nn.Module, esper_fx.MorphableModel]:
    """A model and a morphed twin with parameters of its own."""
    torch.manual_seed(0)
    net = KINDS[name].build()
    return net, esper_fx.morph(copy.deepcopy(net), sites=KINDS[name].sites, example_inputs=examples(name))


def examples(name: str) -> tuple[Any, ...] | None:
    """Arguments for `morph`, where a model needs no others besides."""
    args, kwargs = KINDS[name].inputs(9)
    return None if kwargs else args


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a nest of containers and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in tensors(item)]


def shape_of(value: Any) -> Any:
    """The classes that a nest of containers is made of."""
    if dataclasses.is_dataclass(value):
        return type(value), shape_of(vars(value))
    if isinstance(value, Mapping):
        return type(value), {key: shape_of(item) for key, item in value.items()}
    return (type(value), [shape_of(item) for item in value]) if isinstance(value, tuple | list) else type(value)


def own(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in net.named_parameters() if not name.startswith("esper.")}


def step(net: nn.Module, calls: Calls, optimizer: torch.optim.Optimizer | None = None) -> tuple[Any, dict[str, Tensor]]:
    """Forward and backward, and an update if there is an optimizer: the nest's shape, and outputs, gradients, state."""
    args, kwargs = calls
    given = [tensor for tensor in (*args, *kwargs.values()) if isinstance(tensor, Tensor)]
    result = net(*args, **kwargs)
    outputs = tensors(result)
    loss = sum((y.float() * torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape)).sum() for y in outputs)
    assert isinstance(loss, Tensor)
    for leaf in (*given, *net.parameters()):
        leaf.grad = None
    loss.backward()
    found = {f"output {i}": output.detach().clone() for i, output in enumerate(outputs)}
    found |= {f"gradient of input {i}": x.grad for i, x in enumerate(given) if x.grad is not None}
    found |= {f"gradient of {name}": p.grad.clone() for name, p in own(net).items() if p.grad is not None}
    if optimizer is not None:
        optimizer.step()
    found |= {name: parameter.detach().clone() for name, parameter in own(net).items()}
    found |= {name: b.clone() for name, b in net.named_buffers() if not name.startswith(("esper.", "grown."))}
    return shape_of(result), found


@contextmanager
def kept(*nets: nn.Module) -> Iterator[None]:
    """Put buffers back afterwards."""
    before = [
        (m, n, b, b.clone()) for net in nets for m in net.modules() for n, b in m._buffers.items() if b is not None
    ]
    yield
    for module, key, buffer, value in before:
        module._buffers[key] = buffer.copy_(value)


def looked(net: nn.Module, calls: Calls) -> list[Tensor]:
    """What a model returns; its buffers stay as they are."""
    args, kwargs = calls
    with kept(net), torch.no_grad():
        return tensors(net(*args, **kwargs))


def state_of(net: nn.Module) -> dict[str, Any]:
    """All of a model that morphing must leave alone."""
    tensors_of = (*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False))
    return {
        "modules": {name: (id(m), type(m), m.training, *map(len, _hooks(m))) for name, m in net.named_modules()},
        "attributes": {name: {k: id(v) for k, v in vars(m).items()} for name, m in net.named_modules()},
        "tensors": {name: (id(t), t._version, t.requires_grad, t.grad) for name, t in tensors_of},
    }


def _hooks(module: nn.Module) -> list[Any]:
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._state_dict_hooks]


def test_dormant_it_is_the_original_to_the_bit_over_two_training_steps(name: str) -> None:
    net, model = made(name)
    optimizers = [torch.optim.SGD(side.parameters(), lr=0.1, momentum=0.9) for side in (net, model)]
    for number in range(2):
        calls = KINDS[name].inputs(number)
        (shape, expected), (other, found) = (
            step(side, calls, optimizer) for side, optimizer in zip((net, model), optimizers, strict=True)
        )
        assert other == shape
        assert any(key.startswith("gradient") and bool(value.any()) for key, value in expected.items())
        assert_same(found, expected)
    net.eval(), model.eval()
    assert_same(looked(model, KINDS[name].inputs(7)), looked(net, KINDS[name].inputs(7)))


def test_the_original_is_left_alone(name: str) -> None:
    torch.manual_seed(0)
    net = KINDS[name].build()
    before, values, random = state_of(net), copy.deepcopy(net.state_dict()), torch.get_rng_state()
    model = esper_fx.morph(net, sites=KINDS[name].sites, example_inputs=examples(name))
    assert state_of(net) == before
    assert_same(net.state_dict(), values)
    assert torch.equal(torch.get_rng_state(), random)
    assert {id(p) for p in model.parameters()} == {id(p) for p in net.parameters()}


def test_the_report_says_what_was_kept_as_python_and_why(name: str) -> None:
    _, model = made(name)
    report = {entry.name: entry for entry in model.trace_report()}
    holders = {entry.name for entry in report.values() if "only holds its parts" in entry.why}
    assert all(isinstance(model.get_submodule(holder), nn.ModuleList | nn.ModuleDict) for holder in holders)
    kept_whole = {entry.name for entry in report.values() if entry.how == How.PYTHON} - holders
    kept_whole |= {entry.name for entry in report.values() if entry.how == How.LEAF and "library" not in entry.why}
    kept_whole = {part for part in kept_whole if ".parametrizations" not in part}
    assert kept_whole == set(KINDS[name].python)
    for part, why in KINDS[name].python.items():
        assert why in report[part].why
        assert report[part].why


@pytest.mark.parametrize("number", range(3))
def test_a_seed_trains_becomes_plain_and_prunes_back(name: str, number: int) -> None:
    torch.manual_seed(0)
    net = KINDS[name].build()
    model = esper_fx.morph(net, sites=KINDS[name].sites)
    looked(model, KINDS[name].inputs(9))
    if number >= len(model.seeds):
        return
    seed = list(model.seeds.values())[number]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    esper_fx.attach(optimizer, model)
    seed.germinate("affine")
    body = seed.body
    assert body is not None
    assert {parameter.dtype for parameter in body.parameters()} == {seed.site.dtype}
    for turn in range(2):
        step(model, KINDS[name].inputs(turn), optimizer)
    assert all(bool(parameter.any()) for parameter in body.parameters())
    net.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("esper.")})
    calls = KINDS[name].inputs(5)
    grown, host = looked(model, calls), looked(net, calls)
    assert any(not torch.equal(one, other) for one, other in zip(grown, host, strict=True))
    assert_same(looked(copy.deepcopy(model), calls), grown)

    plain = esper_fx.unmorph(model)
    assert not any(type(module).__module__.startswith("esper_fx") for module in plain.modules())
    assert_same(looked(plain, calls), grown)

    seed.prune()
    assert seed.stage == Stage.EMBARGOED
    sides = []
    for side in (net, model, esper_fx.unmorph(model)):
        with kept(side):
            sides.append(step(side, calls))
    assert sides[1][0] == sides[2][0] == sides[0][0]
    assert_same(sides[1][1], sides[0][1])
    assert_same(sides[2][1], sides[0][1])
    assert type(esper_fx.unmorph(model)) is type(net)
