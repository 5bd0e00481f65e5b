"""Adapters under torch.compile(backend="esper"): equal to eager, swapped without recompiles, with gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx.lifecycle import Stage
from tests.support.adapters import write_checkpoint
from tests.support.linear_kinds import Matrices, Mixed, matrices, with_lora
from tests.support.networks import run

TOKENS = ["first", "keyword", "transposed", "own", "shared", "head.1"]


def maps() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def loras_for(net: nn.Module, sites: list[str], seed: int, rank: int = 2) -> dict[str, Matrices]:
    return {site: matrices(net.get_submodule(site), rank, 1.0, seed + i) for i, site in enumerate(sites)}


def scaled(loras: dict[str, Matrices], scale: float) -> dict[str, Matrices]:
    return {site: Matrices(lora.down, lora.up, scale) for site, lora in loras.items()}


def swap(model: Any, fast: Any, x: Tensor, folder: Path) -> None:
    """Take the adapter on the model away and put another one on."""
    esper_fx.unload_adapter(model)
    fast(x)
    assert {seed.stage for seed in model.seeds.values()} == {Stage.DORMANT}
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    for germination in esper_fx.load_adapter(model, folder, trainable=True).values():
        assert germination.wait(300)
        assert germination.exception() is None


@pytest.mark.parametrize(
    ("make", "shape", "sites"),
    [(Mixed, (2, 3, 6), TOKENS), (maps, (2, 4, 6, 6), ["0", "3"])],
    ids=["tokens", "maps"],
)
def test_adapters_are_swapped_without_recompiles_and_compute_and_learn_as_in_eager_float64(
    tmp_path: Path, make: Callable[[], nn.Module], shape: tuple[int, ...], sites: list[str]
) -> None:
    net, x = make(), torch.randn(shape, requires_grad=True)
    adapters = [loras_for(net, sites, seed) for seed in (0, 50)]
    folders = [write_checkpoint(tmp_path / str(i), loras, lora_alpha=3 + i) for i, loras in enumerate(adapters)]
    model = esper_fx.morph(net, sites=sites, example_inputs=(x.detach(),))
    fast = torch.compile(model, backend="esper")
    torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5)
    compiles = []
    for i, folder in enumerate(folders):
        with torch.compiler.set_stance("fail_on_recompile"):
            swap(model, fast, x, folder)
            assert {seed.stage for seed in model.seeds.values()} == {Stage.ACTIVE}
            actual, mine = run(fast, x)
            assert model.settle(300)
            settled, theirs = run(fast, x)
        compiles.append(model.stats().cache.compiles)
        eager, gradients = run(model, x)
        exact = with_lora(net, {n: lora.double() for n, lora in scaled(adapters[i], (3 + i) / 2).items()})
        expected, wanted = run(exact.double(), x.detach().double().requires_grad_())
        for outputs in (actual, settled, eager):
            torch.testing.assert_close(outputs[0].double(), expected[0], rtol=1e-5, atol=1e-5)
        for compiled in (mine, theirs):
            found = {name.removeprefix("_orig_mod."): gradient for name, gradient in compiled.items()}
            assert found.keys() == gradients.keys()
            assert sum("esper.seeds" in name for name in found) == 2 * len(sites)
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-5, msg=name)
        for name, gradient in wanted.items():
            torch.testing.assert_close(gradients[name].double(), gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert model.stats().recompiles == 0
    assert compiles[0] == compiles[1]  # of equal ranks: the second needs no kernel that the first had not


def test_all_sites_of_an_adapter_go_live_in_one_step(tmp_path: Path) -> None:
    net, x = Mixed(), torch.randn(2, 3, 6)
    loras = loras_for(net, TOKENS, 7, rank=3)
    write_checkpoint(tmp_path, loras, lora_alpha=3)
    model = esper_fx.morph(net, sites=TOKENS, example_inputs=(x,))
    fast = torch.compile(model, backend="esper")
    without, expected = fast(x).detach(), with_lora(net, loras)(x)
    germinations = list(esper_fx.load_adapter(model, tmp_path).values())
    while not all(germination.done() for germination in germinations):
        seen = fast(x)
        whole = torch.allclose(seen, expected, rtol=1e-4, atol=1e-5)
        assert whole or torch.allclose(seen, without, rtol=1e-4, atol=1e-5)
        assert len({germination.done() for germination in germinations}) == 1
    torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)
    live = [event.step for event in model.ledger if event.to is Stage.ACTIVE]
    assert len(live) == len(TOKENS)
    assert len(set(live)) == 1


def test_a_seed_that_reads_its_input_incubates_blends_and_learns_in_a_compiled_program() -> None:
    net, x = Mixed(), torch.randn(2, 3, 6, requires_grad=True)
    model = esper_fx.morph(net, sites=["first", "own"], example_inputs=(x.detach(),))
    fast = torch.compile(model, backend="esper")
    before = fast(x).detach()
    seed = model.seeds["own"]
    assert seed.germinate("low_rank", rank=2, reads="input", scale=0.5).wait(300)
    torch.testing.assert_close(fast(x), before, rtol=1e-5, atol=1e-5)
    nn.init.normal_(seed.body.up.weight)
    for gate in (0.0, 1.0):
        if gate:
            seed.blend(to=0.7, steps=0)
            fast(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            outputs, gradients = run(fast, x)
        exact = copy.deepcopy(model).double()
        expected, wanted = run(exact, x.detach().double().requires_grad_())
        torch.testing.assert_close(outputs[0].double(), expected[0], rtol=1e-5, atol=1e-5)
        for name, gradient in wanted.items():
            mine = gradients["_orig_mod." + name if name != "input0" else name]
            torch.testing.assert_close(mine.double(), gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert model.stats().recompiles == 0


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_another_backend_computes_the_same(tmp_path: Path, backend: str) -> None:
    net, x = Mixed(), torch.randn(2, 3, 6)
    loras = loras_for(net, TOKENS, 3)
    write_checkpoint(tmp_path, loras, lora_alpha=2)
    model = esper_fx.morph(net, sites=TOKENS, example_inputs=(x,))
    fast = torch.compile(model, backend=backend)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5)
    esper_fx.load_adapter(model, tmp_path)
    torch.testing.assert_close(fast(x), with_lora(net, loras)(x), rtol=1e-5, atol=1e-5)


def test_an_adapter_under_no_grad_and_autocast(tmp_path: Path) -> None:
    net, x = Mixed().eval(), torch.randn(2, 3, 6)
    write_checkpoint(tmp_path, loras_for(net, TOKENS, 3), lora_alpha=2, lora_dropout=0.2)
    model = esper_fx.morph(net, sites=TOKENS, example_inputs=(x,))
    fast = torch.compile(model, backend="esper")
    with torch.no_grad():
        fast(x)
        with torch.autocast("cpu", torch.bfloat16):
            fast(x)
        assert all(g.wait(300) for g in esper_fx.load_adapter(model, tmp_path).values())
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(fast(x), model(x), rtol=0.1, atol=0.1)
