"""The engine on a GPU: growth inside a compiled model, with Inductor's kernels and with fused ones, against eager."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx.engine.choice import Chooser
from esper_fx.lifecycle import Stage
from tests.support import models

KINDS = {"transformer": ("low_rank", "bottleneck"), "cnn": ("low_rank", "channel_gate", "depthwise_conv")}


def _example(kind: str) -> models.Example:
    make = {
        "transformer": lambda: models.transformer(vocabulary=64, width=64, depth=4, heads=4, tokens=32, batch=4),
        "cnn": lambda: models.residual_cnn(channels=(32,), blocks_per_stage=4, size=16, batch=8),
    }
    model, inputs, loss = make[kind]()
    return models.Example(model.cuda(), tuple(value.cuda() for value in inputs), loss)


def _gradients(model: nn.Module, forward: Callable[..., Tensor], example: models.Example) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = example.loss(forward(*example.inputs))
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_growth_inside_a_compiled_model_matches_eager(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, fused: bool
) -> None:
    """``fused`` takes every fused kernel there is, whatever is faster. The first call compiles in this process.

    A folder of its own gives each case a kernel cache of its own.
    """
    taken: list[str] = []

    def take(_: Chooser, candidate: object) -> int | None:
        taken.append(candidate.operator)  # type: ignore[attr-defined]
        return 0 if fused else None

    monkeypatch.setattr(Chooser, "__call__", take)
    torch.compiler.reset()
    example = _example(kind)
    model = esper_fx.morph(example.model, sites="blocks.*", example_inputs=example.inputs)
    for number, seed in enumerate(model.seeds.values()):
        seed.germinate(KINDS[kind][number % len(KINDS[kind])])
        with torch.no_grad():
            assert seed.body is not None
            for parameter in seed.body.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    for seed in model.seeds.values():
        seed.blend(to=0.5, steps=0)
    with torch.no_grad():
        model(*example.inputs)
    twin = copy.deepcopy(model)
    expected = _gradients(twin, twin, example)
    with esper_fx.configure(cache_dir=tmp_path, store=False, blocks=False):
        actual = _gradients(model, torch.compile(model, backend="esper"), example)
    assert model.stats().plans == ("whole",)
    assert taken
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 2e-3 * value.norm().clamp_min(1e-3), name


def test_a_seed_germinates_while_training_and_nothing_recompiles() -> None:
    torch.compiler.reset()
    example = _example("transformer")
    model = esper_fx.morph(example.model, sites="blocks.*", example_inputs=example.inputs)
    fast = torch.compile(model, backend="esper")
    optimizer = torch.optim.AdamW(model.parameters())
    esper_fx.attach(optimizer, model)

    def step() -> None:
        example.loss(fast(*example.inputs)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    with torch.compiler.set_stance("fail_on_recompile"):
        seed = model.seeds["blocks.1"]
        seed.germinate("low_rank", rank=8).wait(300)
        step()
        assert seed.stage == Stage.INCUBATING
        seed.blend(to=1.0, steps=2)
        for _ in range(4):
            step()
        assert seed.stage == Stage.ACTIVE
        seed.prune()
        assert model.settle(300)
        step()
    assert model.stats().recompiles == 0


def test_what_is_measured_is_remembered(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A choice is made by measurement on this very device, kept in the store, and never for what is slower."""
    torch.compiler.reset()
    folder = tmp_path_factory.mktemp("kernels")
    folder.chmod(0o700)
    example = _example("transformer")
    with esper_fx.configure(cache_dir=folder):
        model = esper_fx.morph(example.model, sites="blocks.*", example_inputs=example.inputs)
        fast = torch.compile(model, backend="esper")
        example.loss(fast(*example.inputs)).backward()
        model.seeds["blocks.1"].germinate("low_rank", rank=8).wait(300)
        example.loss(fast(*example.inputs)).backward()
        assert model.settle(300)
        entries = esper_fx.ArtifactStore(folder).entries()
    assert [entry.metadata.get("kind") for entry in entries].count("choice") == 1
