"""Models that have grown, made quickly: seeds put into a stage, with bodies that are not zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import esper_fx
from esper_fx.lifecycle import Stage
from tests.support.networks import run

LIVE = (Stage.INCUBATING, Stage.BLENDING, Stage.ACTIVE, Stage.FOSSILIZED)


def grow(
    model: esper_fx.MorphableModel,
    site: str,
    blueprint: str,
    *,
    stage: Stage = Stage.ACTIVE,
    alpha: float = 0.75,
    seed: int = 0,
    **config: Any,
) -> esper_fx.KasminaSeed:
    """Germinate a seed of an eager model, give its body random weights, and bring it to a live stage.

    An optimizer is attached if there is none and the model has parameters, so that a forward call is no clock tick. A
    blend goes from alpha to alpha, so that alpha rests.
    """
    assert stage in LIVE
    if model.growth.attachment is None and any(True for _ in model.parameters()):
        model.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # type: ignore[assignment]
        esper_fx.attach(model.optimizer, model)  # type: ignore[arg-type]
    grown = model.seeds[site]
    grown.germinate(blueprint, alpha=alpha, **config)
    assert grown.body is not None
    randomize(grown.body, seed)
    if stage > Stage.INCUBATING:
        grown.blend(to=alpha, steps=50 if stage is Stage.BLENDING else 0, schedule="linear")
        model.growth.tick()
    if stage is Stage.FOSSILIZED:
        grown.fossilize()
    assert grown.stage is stage
    return grown


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Fill all parameters with random numbers; the global random state stays as it was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def run_by_tensor(module: nn.Module, *inputs: Tensor) -> tuple[list[Tensor], dict[int, Tensor]]:
    """As `networks.run`, with gradients by the identity of the parameter, and the network's buffers as they were."""
    saved = [(buffer, buffer.clone()) for name, buffer in module.named_buffers() if not name.startswith("esper.")]
    outputs, gradients = run(module, *inputs)
    for buffer, value in saved:
        buffer.copy_(value)
    identities = {name: id(parameter) for name, parameter in module.named_parameters()}
    return outputs, {identities.get(name, hash(name)): gradient for name, gradient in gradients.items()}


def assert_same_function(
    plain: nn.Module, model: nn.Module, *inputs: Tensor, gradients_to: float | None = 0.0, exact: bool = True
) -> None:
    """Assert that a plain model and the morphed one it was made of have the same outputs and gradients.

    Args:
        plain: The plain model.
        model: The morphed one, with the same parameters.
        inputs: Their inputs.
        gradients_to: Relative and absolute tolerance of gradients; None: not compared.
        exact: Whether outputs are equal to the bit.
    """
    outputs, gradients = run_by_tensor(plain, *inputs)
    expected, expected_gradients = run_by_tensor(model, *inputs)
    if exact:
        torch.testing.assert_close(outputs, expected, rtol=0, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(outputs, expected)
    if gradients_to is not None:
        assert gradients.keys() == expected_gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[key], rtol=gradients_to, atol=gradients_to)


def classes_of_ours(module: nn.Module) -> list[str]:
    """Every class of esper_fx in the bases of any module."""
    return [
        f"{path}: {base.__qualname__}"
        for path, part in module.named_modules()
        for base in type(part).__mro__
        if base.__module__.split(".")[0] == "esper_fx"
    ]
