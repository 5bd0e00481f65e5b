"""The backend on its own: what a user of torch.compile expects of it, and what happens when something fails."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx.lifecycle import Stage
from tests.support import models


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def _small() -> models.Example:
    return models.transformer(vocabulary=32, width=16, depth=3, heads=2, tokens=8, batch=2)


def _gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    run().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


def _grown(example: models.Example, site: str = "blocks.1", **config: Any) -> esper_fx.MorphableModel:
    model = esper_fx.morph(example.model, sites="blocks.*", example_inputs=example.inputs)
    model.seeds[site].germinate("bottleneck", width=4, **config)
    nn.init.normal_(model.seeds[site].body.up.weight, std=0.1)
    model.seeds[site].blend(to=0.7, steps=0)
    model(*example.inputs)
    return model


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_another_backend_gives_the_same_values_and_gradients(backend: str) -> None:
    example = _small()
    model = _grown(example)
    expected = _gradients(model, lambda: example.loss(model(*example.inputs)))
    fast = torch.compile(model, backend=backend)
    _assert_close(_gradients(model, lambda: example.loss(fast(*example.inputs))), expected)
    model.seeds["blocks.0"].germinate("low_rank", rank=2)
    expected = _gradients(model, lambda: example.loss(model(*example.inputs)))
    _assert_close(_gradients(model, lambda: example.loss(fast(*example.inputs))), expected)


def test_a_model_that_has_grown_before_it_is_compiled() -> None:
    example = _small()
    model = _grown(example)
    expected = _gradients(model, lambda: example.loss(model(*example.inputs)))
    fast = torch.compile(model, backend="esper")
    _assert_close(_gradients(model, lambda: example.loss(fast(*example.inputs))), expected)
    assert model.stats().plans == ("whole",)


def test_two_models_in_one_program_each_keep_what_they_have_grown() -> None:
    x = torch.randn(4, 6)
    first, second = (
        esper_fx.morph(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), sites="0", example_inputs=(x,)) for _ in range(2)
    )
    both = nn.Sequential(first, second)
    fast = torch.compile(both, backend="esper")
    fast(x)
    before = both(x)
    for model in (first, second):
        assert model.seeds["0"].germinate("affine").wait(300)
        for parameter in model.seeds["0"].body.parameters():
            nn.init.constant_(parameter, 0.5)
        assert model.settle(300)
        assert not torch.allclose(both(x), before, atol=1e-2)
        before = both(x)
        torch.testing.assert_close(fast(x), before)
    saved = copy.deepcopy(both.state_dict())
    first.seeds["0"].prune()
    fast(x)
    both.load_state_dict(saved)
    torch.testing.assert_close(fast(x), before)
    assert first.stats().plans == second.stats().plans == ("whole",)


def test_equal_blocks_share_kernels_and_an_equal_change_compiles_nothing() -> None:
    example = _small()
    model = esper_fx.morph(example.model, sites="blocks.*", example_inputs=example.inputs)
    fast = torch.compile(model, backend="esper")
    fast(*example.inputs)
    model.seeds["blocks.0"].germinate("low_rank", rank=3).wait(300)
    assert model.settle(300)
    (program,) = model.growth.changes.programs
    blocks = program.layout.plans[1].regions
    assert len(blocks) > len({region.template for region in blocks})
    before = model.stats().cache
    model.seeds["blocks.1"].germinate("low_rank", rank=3)
    fast(*example.inputs)
    after = model.stats().cache
    assert model.seeds["blocks.1"].stage == Stage.INCUBATING
    assert model.stats().plans == ("blocks",)
    assert after.compiles == before.compiles


@pytest.mark.parametrize(
    ("example", "grow"),
    [
        (
            models.transformer(vocabulary=32, width=16, depth=4, heads=2, tokens=8, batch=2),
            {
                "blocks.0": ("gated_mlp", {"width": 6}),
                "blocks.1": ("attention", {"heads": 2}),
                "blocks.2": ("affine", {}),
                "blocks.3": ("sequence", {"parts": ["affine", ("low_rank", {"rank": 2})]}),
            },
        ),
        (
            models.residual_cnn(channels=(8,), blocks_per_stage=3, size=8, batch=4),
            {"blocks.0": ("conv", {}), "blocks.1": ("attention", {"heads": 2}), "blocks.2": ("gated_mlp", {})},
        ),
    ],
    ids=["tokens", "maps"],
)
def test_every_wider_blueprint_computes_and_learns_as_in_eager_float64(
    example: models.Example, grow: dict[str, tuple[str, dict[str, Any]]]
) -> None:
    model = esper_fx.morph(example.model, sites="blocks.*", example_inputs=example.inputs)
    fast = torch.compile(model, backend="esper")
    fast(*example.inputs)
    germinations = [model.seeds[site].germinate(name, **config) for site, (name, config) in grow.items()]
    assert all(germination.wait(300) for germination in germinations)
    for site in grow:
        for parameter in model.seeds[site].body.parameters():
            nn.init.normal_(parameter, std=0.2)
        model.seeds[site].blend(to=0.7, steps=0)
    fast(*example.inputs)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled = _gradients(model, lambda: example.loss(fast(*example.inputs)))
    exact = copy.deepcopy(model).double()
    inputs = [x.double() if x.is_floating_point() else x for x in example.inputs]
    expected = _gradients(exact, lambda: example.loss(exact(*inputs)))
    assert any(name.startswith("esper.seeds.") for name in compiled)
    _assert_close(compiled, {name: gradient.float() for name, gradient in expected.items()})


def test_training_and_evaluation_programs_switch_together() -> None:
    example = _small()
    model = esper_fx.morph(example.model, sites="blocks.*", example_inputs=example.inputs)
    fast = torch.compile(model, backend="esper")
    fast(*example.inputs)
    with torch.no_grad():
        fast(*example.inputs)
    assert model.stats().programs == 2
    seed = model.seeds["blocks.1"]
    assert seed.germinate("low_rank", rank=2).wait(300)
    nn.init.normal_(seed.body.up.weight)
    trained = fast(*example.inputs)
    with torch.no_grad():
        evaluated = fast(*example.inputs)
        torch.testing.assert_close(evaluated, model(*example.inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained, evaluated, rtol=1e-4, atol=1e-5)


class _Broken(nn.Module):
    """Two graphs per step: the print in the middle breaks the frame."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        torch._dynamo.graph_break()
        return self.second(x)


def test_two_programs_of_one_step_switch_at_its_boundary() -> None:
    net = _Broken()
    model = esper_fx.morph(net, sites=["first", "second"])
    x = torch.randn(4, 8)
    fast = torch.compile(model, backend="esper")
    fast(x)
    for name in ("first", "second"):
        assert model.seeds[name].germinate("low_rank", rank=2).wait(300)
        nn.init.normal_(model.seeds[name].body.up.weight)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


class Mapped(nn.Module):
    """Uses transforms of torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        mapped = torch.vmap(lambda row: torch.vmap(torch.sin)(row) * row.sum(0), randomness="different")(self.first(x))
        slope = torch.func.grad(lambda value: (value**3).sum())(x)
        return self.second(mapped + slope)


def test_transforms_inside_a_model() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    net = Mapped()
    model = esper_fx.morph(net, sites=["first", "second"], example_inputs=(x,))
    fast = torch.compile(model, backend="esper")
    torch.testing.assert_close(fast(x), net(x))
    assert model.seeds["first"].germinate("low_rank", rank=2).wait(120)
    fast(x).square().sum().backward()
    assert model.settle(120)
    assert model.stats().plans == ("whole",)
    assert all(p.grad is not None for p in net.parameters())
    torch.testing.assert_close(fast(x), model(x))


def test_autocast_is_part_of_the_program() -> None:
    example = _small()
    model = esper_fx.morph(example.model, sites="blocks.*", example_inputs=example.inputs)
    fast = torch.compile(model, backend="esper")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast(*example.inputs)
        seed = model.seeds["blocks.1"]
        assert seed.germinate("low_rank", rank=2).wait(300)
        nn.init.normal_(seed.body.up.weight, std=0.1)
        torch.testing.assert_close(fast(*example.inputs), model(*example.inputs), rtol=0.1, atol=0.1)
    assert seed.stage == Stage.INCUBATING


def test_a_body_that_cannot_be_recorded_goes_to_error_and_training_goes_on() -> None:
    @esper_fx.blueprint("test_value_dependent", replace=True)
    def value_dependent(site: esper_fx.SiteSpec) -> nn.Module:
        return _ValueDependent(site.features)

    example = _small()
    model = esper_fx.morph(example.model, sites="blocks.*", example_inputs=example.inputs)
    fast = torch.compile(model, backend="esper")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    esper_fx.attach(optimizer, model)
    before = fast(*example.inputs).detach()
    seed = model.seeds["blocks.1"]
    germination = seed.germinate("test_value_dependent")
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    assert germination.wait(300)
    assert isinstance(germination.exception(), esper_fx.GerminationError)
    assert "cannot be recorded" in str(seed.error)
    assert seed.stage in (Stage.EMBARGOED, Stage.DORMANT)
    assert seed.body is None
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    torch.testing.assert_close(fast(*example.inputs), before)


class _ValueDependent(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().abs().sum()) > 1e9:
            return x * 2
        return x * self.scale


def _worker_pids() -> list[int]:
    """Worker processes of this process, from the process table."""
    pids = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as stat, open(f"/proc/{pid}/cmdline") as command:
                mine = stat.read().rsplit(")", 1)[1].split()[1] == str(os.getpid())
                if mine and "worker" in command.read():
                    pids.append(int(pid))
        except OSError:
            continue
    return pids


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the workers in /proc")
def test_a_killed_worker_is_replaced_and_the_change_goes_live() -> None:
    example = models.transformer(vocabulary=32, width=24, depth=2, heads=2, tokens=8, batch=2)
    model = esper_fx.morph(example.model, sites="blocks.*", example_inputs=example.inputs)
    fast = torch.compile(model, backend="esper")
    fast(*example.inputs)
    germination = model.seeds["blocks.1"].germinate("low_rank", rank=5)
    killed = _worker_pids()
    assert killed
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    assert germination.wait(300)
    assert germination.exception() is None
    torch.testing.assert_close(fast(*example.inputs), model(*example.inputs), rtol=1e-4, atol=1e-5)


def test_without_a_compiler_the_model_runs_eagerly_and_grows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from esper_fx.engine import build, sized_program

    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(build._torch, "compile_graph", no_compiler)
    monkeypatch.setattr(sized_program, "_warned", set())
    example = models.transformer(vocabulary=32, width=8, depth=2, heads=2, tokens=4, batch=1)
    model = esper_fx.morph(example.model, sites="blocks.*", example_inputs=example.inputs)
    fast = torch.compile(model, backend="esper")
    expected = model(*example.inputs)
    torch.testing.assert_close(fast(*example.inputs), expected)
    assert [record.message for record in caplog.records if "runs eagerly" in record.message]
    assert model.stats().plans == ("eager",)
    seed = model.seeds["blocks.1"]
    seed.germinate("low_rank", rank=2)
    fast(*example.inputs)
    assert seed.stage == Stage.INCUBATING
    nn.init.normal_(seed.body.up.weight)
    torch.testing.assert_close(fast(*example.inputs), model(*example.inputs))
    loss = example.loss(fast(*example.inputs))
    loss.backward()
    assert seed.body.up.weight.grad.abs().sum() > 0


def test_a_frozen_host_gives_gradients_to_its_seeds_only() -> None:
    example = _small()
    example.model.requires_grad_(False)
    model = esper_fx.morph(example.model, sites="blocks.*", example_inputs=example.inputs)
    fast = torch.compile(model, backend="esper")
    fast(*example.inputs)
    seed = model.seeds["blocks.0"]
    assert seed.germinate("low_rank", rank=2).wait(300)
    nn.init.normal_(seed.body.up.weight)
    seed.blend(steps=0)
    actual = _gradients(model, lambda: example.loss(fast(*example.inputs)))
    expected = _gradients(model, lambda: example.loss(model(*example.inputs)))
    assert len(actual) == 2
    _assert_close(actual, expected)


def test_two_forwards_before_one_backward_while_alpha_moves() -> None:
    example = _small()
    model = esper_fx.morph(example.model, sites="blocks.*", example_inputs=example.inputs)
    fast = torch.compile(model, backend="esper")
    fast(*example.inputs)
    seed = model.seeds["blocks.1"]
    assert seed.germinate("low_rank", rank=2).wait(300)
    nn.init.normal_(seed.body.up.weight)
    seed.blend(to=0.2, steps=10)
    twin = copy.deepcopy(model)
    losses = [example.loss(fast(*example.inputs)) for _ in range(2)]
    actual = _gradients(model, lambda: losses[0] + losses[1])
    losses = [example.loss(twin(*example.inputs)) for _ in range(2)]
    expected = _gradients(twin, lambda: losses[0] + losses[1])
    _assert_close(actual, expected)


def test_batchnorm_statistics_and_dropout_inside_regions() -> None:
    example = models.residual_cnn(channels=(8,), blocks_per_stage=2, size=8, batch=4)
    plain = copy.deepcopy(example.model)
    model = esper_fx.morph(example.model, sites="blocks.*", example_inputs=example.inputs)
    fast = torch.compile(model, backend="esper")
    for _ in range(3):
        torch.testing.assert_close(fast(*example.inputs), plain(*example.inputs), rtol=1e-4, atol=1e-4)
    for (name, mine), (_, theirs) in zip(model.named_buffers(), plain.named_buffers(), strict=False):
        if not name.startswith("esper."):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_options_are_refused() -> None:
    with pytest.raises(Exception, match="takes no options"):
        torch.compile(nn.Linear(2, 2), backend="esper", options={"x": 1})(torch.zeros(1, 2))
