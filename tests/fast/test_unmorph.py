"""unmorph: the plain model that comes back computes the same, needs no esper_fx, and says what grew."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from torch import Tensor, fx, nn

import esper_fx
from esper_fx import blueprints
from esper_fx.errors import MorphError
from esper_fx.lifecycle import Stage
from esper_fx.passes.trace_report import How
from esper_fx.unmorphing.plain import add_residual_hook, make_plain
from tests.support.cases import CASES, Branching, Keywords, Tied, small_cnn, small_transformer
from tests.support.examples import examples
from tests.support.growing import (
    LIVE,
    assert_same_function,
    classes_of_ours,
    grow,
    randomize,
    run_by_tensor,
)
from tests.support.networks import Description, descriptions, run

# Bodies that read their input once: what flows back into the host is summed in the same order then.
READS_ONCE = ("low_rank", "bottleneck", "affine", "conv", "depthwise_conv")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def grown_transformer(**kept: Any) -> esper_fx.MorphableModel:
    example = small_transformer()
    model = esper_fx.morph(example.model, sites="blocks.*", example_inputs=example.inputs)
    grow(model, "blocks.1", "low_rank", rank=2, **kept)
    return model


def state_of(model: esper_fx.MorphableModel) -> dict[str, Any]:
    """Everything that unmorph must leave alone."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {
        "modules": {name: (id(m), type(m), m.training) for name, m in model.named_modules()},
        "attributes": {name: {k: id(v) for k, v in vars(m).items()} for name, m in model.named_modules()},
        "hooks": {name: list(m._forward_hooks) + list(m._forward_pre_hooks) for name, m in model.named_modules()},
        "tensors": {name: (id(t), t._version, t.requires_grad) for name, t in tensors.items()},
        "graphs": {name: str(graph) for name, graph in model.graphs.items()},
        "events": list(model.ledger),
        "clock": model.clock,
        "rows": repr([model.state.rows(seed.index) for seed in model.seeds.values()]),
    }


# Nothing has grown: the model is what it was.


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_without_growth_the_original_comes_back(name: str, training: bool) -> None:
    make, inputs, sites = CASES[name]
    net = make().train(training)
    x = inputs()
    model = esper_fx.morph(net, sites=sites, example_inputs=x)
    plain = esper_fx.unmorph(model)
    assert {path: type(m) for path, m in plain.named_modules()} == {path: type(m) for path, m in net.named_modules()}
    attributes = {path: set(vars(m)) for path, m in plain.named_modules()}
    attributes[""] -= {"lineage"}
    assert attributes == {path: set(vars(m)) for path, m in net.named_modules()}
    assert {path: m.training for path, m in plain.named_modules()} == {p: m.training for p, m in net.named_modules()}
    mine, theirs = plain.state_dict(keep_vars=True), net.state_dict(keep_vars=True)
    assert list(mine) == list(theirs)
    assert all(mine[key] is theirs[key] for key in theirs)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in plain.modules())
    assert_same_function(plain, model, *x)
    assert_same_function(plain, net, *x)
    assert plain.lineage["sites"] == []  # type: ignore[index]


def test_methods_and_attributes_of_the_class_are_back() -> None:
    model = esper_fx.morph(Keywords(), sites="layer")
    plain = esper_fx.unmorph(model)
    assert isinstance(plain, Keywords)
    assert not isinstance(plain, esper_fx.MorphableModel)
    assert (plain.greeting, plain.scale, plain.double()) == ("hello", 2.0, "mine")
    x, shift = torch.randn(2, 4), torch.randn(4)
    assert torch.equal(plain(x, shift=shift, factor=3.0)["y"], model(x, shift=shift, factor=3.0)["y"])


def test_tracing_leaves_no_constants_in_a_module() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) + torch.tensor([1.0, 2.0, 3.0])

    net = nn.Sequential(Constant(), nn.Tanh())
    model = esper_fx.morph(net, sites="1", example_inputs=(torch.randn(2, 3),))
    assert model.trace_report()[0].how is How.PYTHON
    plain = esper_fx.unmorph(model)
    assert set(vars(plain)) - {"lineage"} == set(vars(net))
    grow(model, "1", "affine")
    plain = esper_fx.unmorph(model)
    x = torch.randn(2, 3)
    assert_same_function(plain, model, x)


# What has grown is kept.


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_grown_at_every_site_it_computes_the_same_to_the_bit(name: str, training: bool) -> None:
    make, inputs, sites = CASES[name]
    net = make().train(training)
    x = inputs()
    model = esper_fx.morph(net, sites=sites, example_inputs=x)
    model(*x)  # where example inputs could not be run through
    for number, (site, seed) in enumerate(model.seeds.items()):
        grow(model, site, "affine" if "low_rank" not in seed.fits() else "low_rank", seed=number)
    plain = esper_fx.unmorph(model)
    assert_same_function(plain, model, *x)
    assert run_by_tensor(plain, *x)[0][0].ne(run_by_tensor(net, *x)[0][0]).any()
    assert classes_of_ours(plain) == []
    own = [key for key in plain.state_dict() if "grown." not in key]
    assert own == list(net.state_dict())


@pytest.mark.parametrize("alpha", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("stage", LIVE, ids=lambda stage: stage.name)
def test_alpha_is_baked_in_as_it_is_now_in_every_stage(stage: Stage, alpha: float) -> None:
    model = grown_transformer(stage=stage, alpha=alpha)
    (ids,) = small_transformer().inputs
    plain = esper_fx.unmorph(model)
    seed = model.seeds["blocks.1"]
    assert_same_function(plain, model, ids, gradients_to=None if stage is Stage.INCUBATING else 0.0)
    assert seed.alpha != 0
    text = plain.code  # type: ignore[union-attr]
    assert ("* " in text) == (seed.alpha != 1.0)
    seed.growth.state.write(seed.index, alpha=5.0)
    assert not torch.equal(plain(ids), model(ids))


def test_the_gate_is_dropped_so_that_an_incubated_body_lets_gradient_through() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), sites="0", example_inputs=(x,))
    grow(model, "0", "low_rank", stage=Stage.INCUBATING)
    plain = esper_fx.unmorph(model)
    open_outputs, open_gradients = run_by_tensor(plain, x)
    closed_outputs, closed_gradients = run_by_tensor(model, x)
    torch.testing.assert_close(open_outputs, closed_outputs, rtol=0, atol=0)
    weight = id(model.get_parameter("0.weight"))
    assert not torch.equal(open_gradients[weight], closed_gradients[weight])
    model.state.write(0, gate=1.0)
    assert_same_function(plain, model, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_stay_and_alpha_loses_no_digits_to_them(dtype: torch.dtype) -> None:
    x = torch.randn(5, 8, dtype=dtype)
    model = esper_fx.morph(nn.Sequential(nn.Linear(8, 8)).to(dtype), sites="0", example_inputs=(x,))
    for alpha in (0.5, 1 / 3):
        model.seeds["0"].stage is Stage.DORMANT and grow(model, "0", "low_rank")
        model.state.write(0, alpha=alpha)
        plain = esper_fx.unmorph(model)
        if alpha == 0.5 or dtype is torch.float64:
            assert_same_function(plain, model, x)
        body, y = model.seeds["0"].body, model.get_submodule("0")(x)
        assert body is not None
        assert plain(x).dtype is dtype
        assert torch.equal(plain(x), y + (model.seeds["0"].alpha * body(y)))


def _fitting() -> list[tuple[str, str]]:
    example, cnn = small_transformer(), small_cnn()
    seeds = {
        "transformer": esper_fx.morph(example.model, sites="blocks.0", example_inputs=example.inputs).seeds["blocks.0"],
        "cnn": esper_fx.morph(cnn.model, sites="blocks.0", example_inputs=cnn.inputs).seeds["blocks.0"],
    }
    builtin = [
        name
        for name in blueprints.names()
        if blueprints.get(name).function.__module__.startswith("esper_fx.blueprints.")
    ]
    return [(kind, name) for kind, seed in seeds.items() for name in builtin if name in seed.fits()]


@pytest.mark.parametrize(("kind", "blueprint"), _fitting())
def test_every_blueprint_becomes_plain_and_computes_the_same(kind: str, blueprint: str, tmp_path: Path) -> None:
    example = small_transformer() if kind == "transformer" else small_cnn()
    model = esper_fx.morph(example.model, sites="blocks.0", example_inputs=example.inputs)
    config = {"parts": ["channel_gate", ("low_rank", {"rank": 2}), "attention"]} if blueprint == "sequence" else {}
    grow(model, "blocks.0", blueprint, **config)
    plain = esper_fx.unmorph(model)
    assert_same_function(plain, model, *example.inputs, gradients_to=0.0 if blueprint in READS_ONCE else 1e-5)
    assert classes_of_ours(plain) == []
    body = plain.get_submodule("grown.blocks_0")
    assert [name for name, _ in body.named_parameters()] == [
        name
        for name, _ in model.seeds["blocks.0"].body.named_parameters()  # type: ignore[union-attr]
    ]
    torch.save(plain, tmp_path / "plain.pt")
    loaded = torch.load(tmp_path / "plain.pt", weights_only=False)
    torch.testing.assert_close(run(loaded, *example.inputs)[0], run(plain, *example.inputs)[0], rtol=0, atol=0)


def test_dormant_pruned_failed_and_germinating_seeds_and_alpha_zero_vanish() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    x = torch.randn(2, 4, requires_grad=True)
    model = esper_fx.morph(net, sites="*", example_inputs=(x,))
    for site in "12345":
        grow(model, site, "low_rank")
    model.seeds["1"].prune("not needed")
    model.growth.fail(model.seeds["2"], RuntimeError("it broke"))
    model.state.write(3, alpha=0.0)
    model.seeds["4"].live = False
    model.state.write(4, stage=int(Stage.GERMINATING))
    plain = esper_fx.unmorph(model)
    assert_same_function(plain, model, x, gradients_to=None)
    assert [name for name, _ in plain.get_submodule("grown").named_children()] == ["site_5"]
    outcomes = {entry["site"]: entry["outcome"] for entry in plain.lineage["sites"]}  # type: ignore[index]
    assert outcomes == {
        "1": "pruned",
        "2": "failed",
        "3": "dropped: its alpha is 0",
        "4": "dropped: still germinating",
        "5": "module grown.site_5",
    }


def test_the_morphed_model_is_left_alone_and_shares_its_tensors() -> None:
    model = grown_transformer(stage=Stage.BLENDING)
    before = state_of(model)
    random = torch.get_rng_state()
    plain = esper_fx.unmorph(model, fold=True)
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    mine = {id(parameter) for parameter in plain.parameters()}
    assert mine == {id(parameter) for parameter in model.parameters()}
    plain.eval().add_module("more", nn.Linear(1, 1))
    plain.get_submodule("grown.blocks_1").add_module("more", nn.Linear(1, 1))
    assert state_of(model) == before


def test_the_mode_of_every_module_is_kept() -> None:
    model = grown_transformer()
    model.eval()
    model.get_submodule("blocks.0").train()
    plain = esper_fx.unmorph(model)
    modes = {path: m.training for path, m in plain.named_modules()}
    assert {path for path, training in modes.items() if training} == {
        path for path, _ in plain.named_modules() if path.startswith("blocks.0")
    }
    model.train()
    assert all(m.training for m in esper_fx.unmorph(model).modules())


def test_running_statistics_go_on_in_the_plain_model() -> None:
    example = small_cnn()
    model = esper_fx.morph(example.model, sites="blocks.0", example_inputs=example.inputs)
    grow(model, "blocks.0", "conv")
    plain = esper_fx.unmorph(model)
    key = "blocks.1.norm1.running_mean"
    assert plain.get_buffer(key) is model.get_buffer(key)
    before = plain.get_buffer(key).clone()
    plain(*example.inputs)
    assert not torch.equal(plain.get_buffer(key), before)
    plain.eval(), model.eval()
    assert_same_function(plain, model, *example.inputs)


def test_attributes_unused_parts_buffers_and_hooks_stay_in_a_module_that_keeps_seeds() -> None:
    class Rich(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("counter", torch.zeros(1))
            self.register_buffer("scratch", torch.ones(2), persistent=False)
            self.unused = nn.Linear(2, 2)
            self.loose = nn.Parameter(torch.ones(3))
            self.layer = nn.Linear(4, 4)
            self.facts = {"made": "by hand", "layers": [self.layer]}

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layer(x))

    calls: list[str] = []
    net = Rich()
    net.register_forward_hook(lambda *_: calls.append("root"))
    model = esper_fx.morph(net, sites="layer", example_inputs=(torch.randn(2, 4),))
    grow(model, "layer", "low_rank")
    plain = esper_fx.unmorph(model)
    calls.clear()
    assert_same_function(plain, model, torch.randn(2, 4))
    assert calls == ["root", "root"]
    assert isinstance(plain, fx.GraphModule)
    assert type(plain).__name__ == "Rich"
    assert [name for name, _ in plain.named_children()] == ["unused", "layer", "grown"]
    assert list(plain.state_dict()) == [*net.state_dict(), "grown.layer.down.weight", "grown.layer.up.weight"]
    assert plain.loose is net.loose
    assert torch.equal(plain.get_buffer("scratch"), torch.ones(2))
    assert plain.facts["made"] == "by hand"  # type: ignore[index]
    assert plain.facts["layers"][0] is plain.layer  # type: ignore[index]


def test_a_site_with_several_visits_keeps_one_body() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    model = esper_fx.morph(Tied(), sites=["embed", "head"], example_inputs=(x,))
    grow(model, "embed", "bottleneck", width=3)
    plain = esper_fx.unmorph(model)
    assert_same_function(plain, model, x)
    calls = [node.target for node in plain.graph.nodes if node.op == "call_module"]  # type: ignore[union-attr]
    assert calls.count("grown.embed") == 2
    assert [name for name, _ in plain.get_submodule("grown").named_children()] == ["embed"]
    assert plain.head.weight is plain.embed.weight  # type: ignore[union-attr]


def test_keyword_arguments_and_structured_outputs_survive_with_a_kept_seed() -> None:
    x, shift = torch.randn(2, 4), torch.randn(4)
    model = esper_fx.morph(Keywords(), sites="layer", example_inputs={"x": x, "shift": shift})
    grow(model, "layer", "affine")
    plain = esper_fx.unmorph(model)
    for arguments in ({"shift": shift}, {"shift": shift, "factor": 3.0}):
        actual, expected = plain(x, **arguments), model(x, **arguments)
        assert torch.equal(actual["y"], expected["y"])
        assert actual["x"] is x


def test_only_the_parts_that_keep_seeds_become_graph_modules() -> None:
    x = torch.randn(2, 4)
    model = esper_fx.morph(Branching(), sites=["first.*", "second"], example_inputs=(x,))
    model(x)
    grow(model, "first.1", "low_rank")
    plain = esper_fx.unmorph(model)
    assert type(plain) is Branching
    assert isinstance(plain.first, fx.GraphModule)
    assert type(plain.second) is nn.Linear
    for sign in (1.0, -1.0):
        assert torch.equal(plain(torch.full((2, 4), sign)), model(torch.full((2, 4), sign)))
    assert plain.lineage["sites"][0]["outcome"] == "module first.grown.site_1"  # type: ignore[index]
    grow(model, "second", "low_rank")
    plain = esper_fx.unmorph(model)
    assert torch.equal(plain(x), model(x))
    assert plain.lineage["sites"][1]["outcome"] == "module second.grown.output"  # type: ignore[index]


def test_names_of_bodies_are_readable_and_never_collide() -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"b": nn.Linear(4, 4)})
            self.a_b = nn.Linear(4, 4)
            self.train_ = nn.Linear(4, 4)
            self.grown = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.grown(self.train_(self.a_b(self.a["b"](x))))

    x = torch.randn(2, 4)
    model = esper_fx.morph(Names(), sites=nn.Linear, example_inputs=(x,))
    for site in model.seeds:
        grow(model, site, "affine")
    plain = esper_fx.unmorph(model)
    assert torch.equal(plain(x), model(x))
    assert type(plain.grown) is nn.Linear
    assert [name for name, _ in plain.get_submodule("grown_2").named_children()] == ["a_b", "a_b_2", "train_", "grown"]


def test_a_compiled_model_is_taken_as_the_model_it_compiles() -> None:
    model = grown_transformer()
    plain = esper_fx.unwrap(torch.compile(model, backend="esper"))
    assert_same_function(plain, model, *small_transformer().inputs)


@examples(40)
@given(
    descriptions(),
    st.data(),
    st.sampled_from([1.0, 0.5, -0.3]),
    st.booleans(),
)
def test_any_network_with_anything_grown_anywhere_computes_the_same_to_the_bit(
    description: Description, data: st.DataObject, alpha: float, training: bool
) -> None:
    net, x = description.build().train(training), description.example()
    model = esper_fx.morph(net, sites="**", example_inputs=(x,))
    sites = data.draw(st.lists(st.sampled_from(list(model.seeds)), unique=True, max_size=4))
    exact = True
    for number, site in enumerate(sites):
        blueprint = data.draw(st.sampled_from([name for name in model.seeds[site].fits() if name in KINDS]))
        stage = data.draw(st.sampled_from(LIVE))
        grow(model, site, blueprint, stage=stage, alpha=alpha, seed=number, **KINDS[blueprint])
        exact = exact and blueprint in READS_ONCE
        model.state.write(model.seeds[site].index, gate=1.0)
    plain = esper_fx.unmorph(model)
    assert_same_function(plain, model, x, gradients_to=0.0 if exact else 1e-3)
    assert classes_of_ours(plain) == []
    twin = copy.deepcopy(plain)
    torch.testing.assert_close(run(twin, x)[0], run(plain, x)[0], rtol=0, atol=0)


KINDS: dict[str, dict[str, Any]] = {
    "low_rank": {"rank": 2},
    "affine": {},
    "bottleneck": {"width": 2},
    "channel_gate": {},
    "depthwise_conv": {},
    "gated_mlp": {"width": 2},
    "sequence": {"parts": ["affine", ("low_rank", {"rank": 1})]},
}


# Bodies.


class OwnBody(nn.Module):
    """A user's body with a module of esper_fx inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before = nn.LayerNorm(4)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.before(x)) * (2.0 if self.training else 1.0)


def own_body_model(inner: nn.Module) -> tuple[esper_fx.MorphableModel, Tensor]:
    @esper_fx.blueprint("own_body_of_a_test", replace=True)
    def own(site: esper_fx.SiteSpec) -> nn.Module:
        for parameter in inner.parameters():
            nn.init.zeros_(parameter)
        return OwnBody(inner)

    x = torch.randn(3, 4)
    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4)), sites="0", example_inputs=(x,))
    grow(model, "0", "own_body_of_a_test")
    return model, x


def site_of_four() -> esper_fx.SiteSpec:
    return esper_fx.SiteSpec("somewhere", (2, 4), torch.float32, torch.device("cpu"), 1)


def test_a_users_body_stays_what_it_is_and_what_it_contains_of_ours_becomes_plain() -> None:
    inner = blueprints.get("sequence").build(site_of_four(), {"parts": ["low_rank", "channel_gate"]}, seed=0)
    model, x = own_body_model(inner)
    for training in (True, False):
        model.train(training)
        plain = esper_fx.unmorph(model)
        assert type(plain.get_submodule("grown.site_0")) is OwnBody
        assert isinstance(plain.get_submodule("grown.site_0.inner"), fx.GraphModule)
        assert classes_of_ours(plain) == []
        assert_same_function(plain, model, x, gradients_to=1e-5)
    assert type(model.seeds["0"].body.inner).__name__ == "Chain"  # type: ignore[union-attr]


def test_a_class_of_ours_that_cannot_be_traced_is_refused_by_name() -> None:
    from esper_fx.blueprints.affine import Affine

    class Derived(Affine):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x * 0

    model, _ = own_body_model(Derived(4, -1))
    before = state_of(model)
    with pytest.raises(
        MorphError,
        match=r"the body at site '0' contains a Derived at 'inner', a class of esper_fx that cannot be turned into a plain "
        r"one: .*Derive from torch.nn.Module instead, or prune the seed first",
    ):
        esper_fx.unmorph(model)
    assert state_of(model) == before


def test_a_body_that_holds_something_of_ours_in_an_attribute_is_refused_by_name() -> None:
    model, x = own_body_model(nn.Linear(4, 4))
    body = model.seeds["0"].body
    body.sites = {"here": [site_of_four()]}  # type: ignore[union-attr,assignment]
    with pytest.raises(
        MorphError,
        match=r"the body at site '0' holds a SiteSpec of esper_fx in attribute 'sites': nobody could load it",
    ):
        esper_fx.unmorph(model)
    del body.sites  # type: ignore[union-attr]
    assert_same_function(esper_fx.unmorph(model), model, x)


def test_a_module_with_parts_that_a_graph_module_has_itself_is_refused_only_if_seeds_are_kept_in_it() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.code(x)

    x = torch.randn(2, 4)
    model = esper_fx.morph(Graph(), sites="code", example_inputs=(x,))
    assert type(esper_fx.unmorph(model)) is Graph
    grow(model, "code", "affine")
    with pytest.raises(MorphError, match="Graph has parts called code, which is what torch.fx.GraphModule calls parts"):
        esper_fx.unmorph(model)


def test_making_bodies_plain_never_uses_the_tracer_that_patches_every_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model = grown_transformer()
    monkeypatch.setattr(fx.Tracer, "trace", lambda *_: pytest.fail("traced with torch.fx's own tracer"))
    assert_same_function(esper_fx.unmorph(model), model, *small_transformer().inputs)


def test_only_a_morphed_model_can_be_unmorphed() -> None:
    with pytest.raises(MorphError, match=r"unmorph\(\) needs a model that esper_fx.morph has made, not a Linear"):
        esper_fx.unmorph(nn.Linear(2, 2))
    assert esper_fx.unwrap is esper_fx.unmorph


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_module_that_stays_python_adds_what_its_body_returns_by_a_hook(alpha: float, tmp_path: Path) -> None:
    layer, body = nn.Bilinear(3, 3, 4), blueprints.get("low_rank").build(site_of_four(), {"rank": 2}, seed=0)
    randomize(body)
    make_plain(body, "here")
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    before = layer(input2=y, input1=x)
    add_residual_hook(layer, layer, "grown", "output", body, alpha)
    for module in (layer, copy.deepcopy(layer)):
        torch.testing.assert_close(module(input2=y, input1=x), before + alpha * body(before), rtol=0, atol=0)
    assert list(layer.state_dict()) == ["weight", "bias", "grown.output.down.weight", "grown.output.up.weight"]
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    torch.testing.assert_close(loaded(x, y), layer(x, y), rtol=0, atol=0)


class Answer(NamedTuple):
    first: Tensor
    second: int


@pytest.mark.parametrize("value", [(1, 2), [1], Answer(torch.zeros(1), 3)], ids=["tuple", "list", "named tuple"])
def test_of_a_tuple_the_first_item_grows_and_the_others_pass(value: Any, tmp_path: Path) -> None:
    layer, x = Several(value), torch.randn(2, 4)
    body = nn.Linear(4, 4)
    add_residual_hook(layer, layer, "grown", "output", body, 0.5, type(value))
    torch.save(layer, tmp_path / "layer.pt")
    for module in (layer, copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        result = module(x)
        assert type(result) is type(value)
        assert torch.equal(result[0], x * 2 + 0.5 * body(x * 2))
        assert result[1:] == value[1:]


class Several(nn.Module):
    """Returns a tensor and other things, in a container of a given kind."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        items = (x * 2, *self.value[1:])
        return type(self.value)(*items) if hasattr(self.value, "_fields") else type(self.value)(items)


# Elsewhere.


def test_safetensors_hold_it(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    model = esper_fx.morph(Tied(), sites="*", example_inputs=(x,))
    grow(model, "head", "low_rank", rank=2)
    plain = esper_fx.unmorph(model)
    save_model(plain, str(tmp_path / "plain.safetensors"))
    expected = plain(x)
    other = esper_fx.unmorph(copy.deepcopy(model))
    randomize(other)
    assert not torch.equal(other(x), expected)
    load_model(other, tmp_path / "plain.safetensors")
    assert torch.equal(other(x), expected)


def test_what_has_grown_can_grow_again() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    first = esper_fx.morph(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), sites="0", example_inputs=(x,))
    grow(first, "0", "low_rank", rank=2)
    plain = esper_fx.unmorph(first)
    second = esper_fx.morph(plain, sites=["1", "grown.site_0"], example_inputs=(x,))
    assert_same_function(second, first, x)
    same, other = esper_fx.unmorph(second), esper_fx.unmorph(second)
    assert isinstance(same, fx.GraphModule)
    assert_same_function(same, first, x)
    (output,) = (node for node in same.graph.nodes if node.op == "output")
    output.args = (next(iter(same.graph.nodes)),)
    same.recompile()
    assert same(x) is x
    assert_same_function(plain, first, x)  # their forwards are still their own
    assert_same_function(other, first, x)
    grow(second, "1", "affine")
    grow(second, "grown.site_0", "affine", seed=1)
    third = esper_fx.unmorph(second)
    assert_same_function(third, second, x)
    assert {name for name, _ in third.named_children()} == {"0", "1", "grown", "grown_2"}
    assert third.lineage["earlier"] == plain.lineage  # type: ignore[index]
    assert [entry["outcome"] for entry in third.lineage["sites"]] == [  # type: ignore[index]
        "module grown_2.grown_site_0",
        "module grown_2.site_1",
    ]
    twin = copy.deepcopy(second)
    assert_same_function(third, second, x)
    torch.testing.assert_close(twin(x), second(x), rtol=0, atol=0)


def test_a_copy_of_a_graph_module_keeps_what_torchs_own_copy_loses() -> None:
    model = grown_transformer()
    plain = esper_fx.unmorph(model)
    plain.note = "mine"  # type: ignore[assignment]
    assert copy.deepcopy(plain).lineage == plain.lineage
    again = esper_fx.morph(plain, sites="norm", example_inputs=small_transformer().inputs)
    assert again.note == "mine"
    assert esper_fx.unmorph(again).note == "mine"


# Lineage.


def test_the_lineage_says_what_grew_where_when_and_why(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    model = esper_fx.morph(net, sites="*", example_inputs=(torch.randn(2, 4),))
    grow(model, "2", "low_rank", rank=3, activation="relu", stage=Stage.FOSSILIZED, alpha=0.5)
    grow(model, "0", "bottleneck")
    model.seeds["0"].prune("no use")
    plain = esper_fx.unmorph(model)
    lineage: Any = plain.lineage
    assert (lineage["format"], lineage["model"], lineage["clock"]) == ("esper_fx lineage 1", "Sequential", 2)
    assert (lineage["esper_fx"], lineage["torch"]) == (esper_fx.__version__, torch.__version__)
    pruned, kept = lineage["sites"]
    assert {key: kept[key] for key in kept if key != "events"} == {
        "site": "2",
        "blueprint": "low_rank",
        "config": {"rank": 3, "activation": "relu", "reads": "output", "scale": 1.0, "dropout": 0.0},
        "parameters": 24,
        "stage": "FOSSILIZED",
        "alpha": 0.5,
        "outcome": "module grown.site_2",
    }
    assert [(e["step"], e["from"], e["to"]) for e in kept["events"]] == [
        (0, "DORMANT", "GERMINATING"),
        (0, "GERMINATING", "INCUBATING"),
        (0, "INCUBATING", "BLENDING"),
        (1, "BLENDING", "ACTIVE"),
        (1, "ACTIVE", "FOSSILIZED"),
    ]
    assert kept["events"][-1]["why"] == "kept by the user"
    assert (pruned["blueprint"], pruned["config"], pruned["outcome"]) == ("bottleneck", None, "pruned")
    assert pruned["events"][-1]["why"] == "no use"
    path = tmp_path / "lineage.json"
    esper_fx.write_lineage(path, plain)
    assert json.loads(path.read_text(encoding="utf-8")) == lineage
    assert [file.name for file in tmp_path.iterdir()] == ["lineage.json"]


def test_the_lineage_of_a_model_that_still_grows(tmp_path: Path) -> None:
    model = grown_transformer(stage=Stage.BLENDING)
    esper_fx.write_lineage(tmp_path / "lineage.json", torch.compile(model, backend="esper"))
    (entry,) = json.loads((tmp_path / "lineage.json").read_text(encoding="utf-8"))["sites"]
    assert (entry["site"], entry["stage"], entry["outcome"]) == ("blocks.1", "BLENDING", "live")


def test_a_config_of_any_values_becomes_json(tmp_path: Path) -> None:
    @esper_fx.blueprint("odd_values_of_a_test", replace=True)
    def odd(site: esper_fx.SiteSpec, *, scale: float, dtype: torch.dtype, pair: tuple[int, int]) -> nn.Module:
        layer = nn.Linear(4, 4)
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        return layer

    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4)), sites="0", example_inputs=(torch.randn(2, 4),))
    grow(model, "0", "odd_values_of_a_test", scale=float("inf"), dtype=torch.float16, pair=(1, 2))
    esper_fx.write_lineage(tmp_path / "lineage.json", model)
    (entry,) = json.loads((tmp_path / "lineage.json").read_text(encoding="utf-8"))["sites"]
    assert entry["config"] == {"scale": "inf", "dtype": "torch.float16", "pair": [1, 2]}


def test_a_model_without_lineage_is_refused_and_so_is_an_attribute_of_that_name() -> None:
    with pytest.raises(
        MorphError, match="Linear has no lineage: expected a model that esper_fx.morph or esper_fx.unmorph"
    ):
        esper_fx.write_lineage("nowhere.json", nn.Linear(2, 2))
    net = nn.Sequential(nn.Linear(2, 2))
    net.lineage = "a long one"  # type: ignore[assignment]
    with pytest.raises(MorphError, match="Sequential has attributes of its own called lineage; rename them first"):
        esper_fx.morph(net, sites="0")
