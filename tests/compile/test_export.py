"""What unmorph returns goes where plain models go: torch.export, ONNX, torch.compile."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper_fx
from esper_fx.unmorphing.plain import add_residual_hook
from tests.support import models
from tests.support.growing import grow


def transformer() -> tuple[nn.Module, Any, list[str]]:
    example = models.transformer(vocabulary=16, width=8, depth=2, heads=2, tokens=6, batch=2)
    return example.model, example.inputs, ["attention", "channel_gate", "gated_mlp", "affine", "low_rank"]


def cnn() -> tuple[nn.Module, Any, list[str]]:
    example = models.residual_cnn(channels=(4,), blocks_per_stage=2, size=6, batch=3)
    return example.model, example.inputs, ["depthwise_conv", "conv", "channel_gate", "attention", "bottleneck"]


def plain_model(kind: Any, fold: bool) -> tuple[nn.Module, Any, torch.Tensor]:
    """A plain model in eval mode with every blueprint somewhere in it, its inputs, and what the morphed one returns."""
    net, inputs, names = kind()
    model = esper_fx.morph(net, sites=["blocks.*", "blocks.*.*", "head"], example_inputs=inputs)
    for number, (site, seed) in enumerate(model.seeds.items()):
        fitting = [name for name in names if name in seed.fits()]
        grow(model, site, fitting[number % len(fitting)], alpha=1.0 if number % 2 else 0.5, seed=number)
    model.eval()
    return esper_fx.unmorph(model, fold=fold), inputs, model(*inputs).detach()


KINDS = pytest.mark.parametrize("kind", [transformer, cnn])
FOLD = pytest.mark.parametrize("fold", [False, True], ids=["kept", "folded"])


@FOLD
@KINDS
def test_export_computes_the_same_also_from_a_file(kind: Any, fold: bool) -> None:
    plain, inputs, expected = plain_model(kind, fold)
    for strict in (False, True):
        program = torch.export.export(plain, inputs, strict=strict)
        torch.testing.assert_close(program.module()(*inputs), expected, rtol=1e-4, atol=1e-5)
        assert "esper" not in str(program.graph)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(*inputs), expected, rtol=1e-4, atol=1e-5)


@FOLD
@KINDS
def test_onnx_computes_the_same_in_its_reference_implementation(kind: Any, fold: bool, tmp_path: Path) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    plain, inputs, expected = plain_model(kind, fold)
    program = torch.onnx.export(plain, inputs, dynamo=True, verbose=False)
    assert program is not None
    program.save(str(tmp_path / "plain.onnx"))
    model = onnx.load(str(tmp_path / "plain.onnx"))
    names = [value.name for value in model.graph.input]
    evaluator = ReferenceEvaluator(model)
    (result,) = evaluator.run(None, {name: x.detach().numpy() for name, x in zip(names, inputs, strict=True)})
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-3, atol=1e-4)


def test_it_compiles_without_esper_fx_in_one_graph() -> None:
    plain, inputs, expected = plain_model(transformer, False)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_module_with_a_hook_for_its_body_is_exported_with_it() -> None:
    layer, x = nn.Bilinear(3, 3, 4), torch.randn(2, 3)
    add_residual_hook(layer, layer, "grown", "output", nn.Linear(4, 4), 0.5)
    expected = layer(x, x).detach()
    for strict in (False, True):
        program = torch.export.export(layer, (x, x), strict=strict)
        torch.testing.assert_close(program.module()(x, x), expected)


def test_a_model_that_grew_compiled_unmorphs_to_what_it_computes() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(4, 8)
    model = esper_fx.morph(net, sites="0", example_inputs=(x,))
    fast = torch.compile(model, backend="esper")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    esper_fx.attach(optimizer, model)
    fast(x).sum().backward()
    seed = model.seeds["0"]
    assert seed.germinate("low_rank", rank=2).wait(120)
    seed.blend(steps=0)
    for _ in range(3):
        optimizer.zero_grad()
        fast(x).square().sum().backward()
        optimizer.step()
    assert seed.alpha == 1.0
    expected = fast(x)
    for fold in (False, True):
        plain = esper_fx.unmorph(fast, fold=fold)
        torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)
    assert type(plain) is nn.Sequential
    (entry,) = plain.lineage["sites"]  # type: ignore[index]
    assert [event["why"] for event in entry["events"]][1] == "its kernels are live"
