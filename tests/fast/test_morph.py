"""morph: the model it returns, the original it leaves alone, and every input it refuses."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper_fx
from esper_fx.errors import (
    BlueprintError,
    EsperError,
    LifecycleError,
    MorphError,
    OptimizerError,
    SiteError,
    UnknownBlueprintError,
)
from esper_fx.lifecycle import Stage
from tests.support.cases import (
    CASES,
    Around,
    Branching,
    Keywords,
    ReadsTraining,
    Tied,
    small_cnn,
    small_transformer,
)
from tests.support.networks import assert_same, run, twin


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def _state_of(net: nn.Module) -> dict[str, Any]:
    """Everything about a module that morph must not change: identities of tensors and modules, flags, hooks, attributes."""
    return {
        "modules": {name: (id(m), type(m), m.training, dict(m._forward_hooks)) for name, m in net.named_modules()},
        "tensors": {name: (id(t), t._version, t.requires_grad) for name, t in _tensors(net).items()},
        "grads": {name: id(p.grad) for name, p in net.named_parameters()},
        "attributes": {name: {key: id(value) for key, value in vars(m).items()} for name, m in net.named_modules()},
    }


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    return dict(net.named_parameters(remove_duplicate=False)) | dict(net.named_buffers(remove_duplicate=False))


# The model that comes back.


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_a_dormant_model_is_bitwise_the_original(name: str, training: bool) -> None:
    make, inputs, sites = CASES[name]
    net = make().train(training)
    copied = twin(net)
    x = inputs()
    model = esper_fx.morph(net, sites=sites, example_inputs=x)
    outputs, gradients = run(model, *x)
    expected, expected_gradients = run(copied, *x)
    assert_same(outputs, expected)
    assert_same(gradients, expected_gradients)
    own = {key: buffer for key, buffer in model.named_buffers() if not key.startswith("esper.")}
    assert_same(own, dict(copied.named_buffers()))


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_buffers_are_shared_under_their_own_names(name: str) -> None:
    make, _, sites = CASES[name]
    net = make()
    model = esper_fx.morph(net, sites=sites)
    mine = {key: tensor for key, tensor in _tensors(model).items() if not key.startswith("esper.")}
    theirs = _tensors(net)
    assert list(mine) == list(theirs)
    assert all(mine[key] is theirs[key] for key in theirs)
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in net.named_parameters()]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_the_original_is_left_alone(name: str, training: bool) -> None:
    make, inputs, sites = CASES[name]
    net = make().train(training)
    if name == "transformer":
        net.blocks[0].eval()  # type: ignore[index,operator]
    before, values = _state_of(net), {key: value.clone() for key, value in net.state_dict().items()}
    random = torch.get_rng_state()
    model = esper_fx.morph(
        net, sites=sites, example_inputs=inputs() if name != "transformer" else small_transformer().inputs
    )
    assert _state_of(net) == before
    assert {key: module.training for key, module in net.named_modules()} == {
        key: module.training for key, module in model.named_modules() if not key.startswith("esper")
    }
    for key, value in net.state_dict().items():
        assert torch.equal(value, values[key])
    model.train(not training)
    assert _state_of(net) == before
    if name in ("python root", "sequential"):  # they draw nothing in inputs() after the snapshot but vectors
        return
    if name in ("transformer", "cnn"):
        assert torch.equal(torch.get_rng_state(), random)


def test_training_one_model_trains_the_other_and_an_old_checkpoint_loads() -> None:
    net = Tied()
    checkpoint = copy.deepcopy(net.state_dict())
    model = esper_fx.morph(net, sites="embed")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(net.embed.weight, checkpoint["embed.weight"])
    result = model.load_state_dict(checkpoint, strict=False)
    assert not result.unexpected_keys
    assert all(key.startswith("esper.") for key in result.missing_keys)
    assert torch.equal(net.embed.weight, checkpoint["embed.weight"])
    assert model.head.weight is model.embed.weight


def test_the_model_is_of_the_originals_class_and_its_attributes_are_there() -> None:
    model = esper_fx.morph(Keywords(), sites="layer")
    assert isinstance(model, Keywords)
    assert isinstance(model, esper_fx.MorphableModel)
    assert type(model).__name__ == "MorphableKeywords"
    assert (model.greeting, model.scale, model.double()) == ("hello", 2.0, "mine")


def test_keyword_arguments_and_structured_outputs_survive() -> None:
    net = Keywords()
    x, shift = torch.randn(2, 4), torch.randn(4)
    model = esper_fx.morph(net, sites="layer", example_inputs={"x": x, "shift": shift})
    for arguments in ({"shift": shift}, {"shift": shift, "factor": 3.0}):
        actual, expected = model(x, **arguments), net(x, **arguments)
        assert actual.keys() == expected.keys()
        assert torch.equal(actual["y"], expected["y"])
        assert actual["x"] is x


class Named(nn.ModuleDict):
    """Calls its items in turn."""

    def __init__(self) -> None:
        super().__init__({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for module in self.values():
            x = module(x)
        return x


def test_a_container_has_the_items_that_it_had_and_the_seeds_beside_them() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model: Any = esper_fx.morph(net, sites="*")
    assert [name for name, _ in model.named_children()] == ["0", "1", "2", "esper"]
    assert isinstance(model, nn.Sequential)
    assert len(model) == 3
    assert list(model) == [model[0], model[1], model[-1]]
    assert model[1] in model
    assert model.esper not in model
    assert type(model[1:]) is nn.Sequential
    assert list(model[1:]) == [model[1], model[2]]
    named: Any = esper_fx.morph(Named(), sites="*")
    assert list(named) == list(named.keys()) == ["a", "b"]
    assert [name for name, _ in named.items()] == ["a", "b"]
    assert list(named.values()) == [named["a"], named["b"]]
    assert "esper" not in named
    assert "a" in named


def test_a_root_that_stays_python_has_graphs_of_its_parts_only() -> None:
    net = Branching()
    model = esper_fx.morph(net, sites=["first.*", "second"])
    assert set(model.seeds) == {"first.0", "first.1", "second"}
    assert set(model.graphs) == {"first", "second"}
    with pytest.raises(MorphError, match="the forward of MorphableBranching is plain Python; see graphs for its parts"):
        _ = model.graph
    for sign in (1.0, -1.0):  # both branches are still decided at run time
        x = torch.full((2, 4), sign)
        assert torch.equal(model(x), net(x))
    assert torch.equal(model.first(torch.ones(1, 4)), net.first(torch.ones(1, 4)))


def test_the_mode_is_read_at_run_time() -> None:
    for make, sites in ((ReadsTraining, "layer"), (Around, ["inner", "after"])):
        net = make()
        model = esper_fx.morph(net, sites=sites)
        x = torch.randn(2, 4)
        for training in (True, False, True):
            assert torch.equal(model.train(training)(x), net.train(training)(x))


def test_hooks_of_the_original_go_with_the_model_and_run_once() -> None:
    calls: list[str] = []
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    net[1].register_forward_hook(lambda *_: calls.append("inner"))
    net.register_forward_hook(lambda *_: calls.append("root"))
    model = esper_fx.morph(net, sites="*", example_inputs=(torch.randn(2, 4),))
    calls.clear()
    model(torch.randn(2, 4))
    assert calls == ["inner", "root"]
    assert len(net._forward_pre_hooks) == 0


def test_seeds_are_listed_by_site_and_know_what_flows() -> None:
    example = small_cnn()
    model = esper_fx.morph(example.model, sites=["blocks.*", "head"], example_inputs=example.inputs)
    assert list(model.seeds) == ["blocks.0", "blocks.1", "head"]
    assert [seed.index for seed in model.seeds.values()] == [0, 1, 2]
    site = model.seeds["blocks.0"].site
    assert (site.shape, site.dtype, site.feature_dim, site.features) == ((3, 4, 6, 6), torch.float32, 1, 4)
    assert model.seeds["head"].site.feature_dim == 1
    assert "depthwise_conv" in model.seeds["blocks.0"].fits()
    assert "depthwise_conv" not in model.seeds["head"].fits()
    assert all(seed.stage == Stage.DORMANT and seed.body is None for seed in model.seeds.values())
    assert len(model.morphology) == 0
    assert hash(model.morphology) == hash(esper_fx.Morphology())
    assert list(model.ledger) == []


def test_without_example_inputs_a_site_is_known_after_the_first_call() -> None:
    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4)), sites="0")
    with pytest.raises(SiteError, match=r"nothing is known of site '0' yet: pass example_inputs to morph\(\), or run"):
        _ = model.seeds["0"].site
    model(torch.randn(2, 4))
    assert model.seeds["0"].site.shape == (2, 4)


def test_the_passes_that_ran_are_on_record() -> None:
    model = esper_fx.morph(Tied(), sites="embed")
    assert [record.name for record in model.pass_records] == ["trace", "find_sites", "find_sources", "splice"]
    assert all(record.changed and record.seconds >= 0 for record in model.pass_records)
    assert "esper_seeds_embed" in str(model.graph)


def test_a_copy_grows_alone() -> None:
    model = esper_fx.morph(Tied(), sites=["embed", "head"], example_inputs=(torch.randn(2, 4),))
    model.seeds["head"].germinate("low_rank", rank=2)
    other = copy.deepcopy(model)
    x = torch.randn(2, 4)
    assert other.seeds["head"].blueprint == "low_rank"
    other.seeds["embed"].germinate("low_rank", rank=2)
    with torch.no_grad():
        for parameter in other.seeds["embed"].parameters():
            parameter.fill_(0.5)
    other.seeds["embed"].blend(steps=0)
    other(x)
    assert model.seeds["embed"].stage == Stage.DORMANT
    assert other.seeds["embed"].stage in (Stage.BLENDING, Stage.ACTIVE)
    assert len(model.morphology) == 1
    assert len(other.morphology) == 2
    assert not torch.equal(other(x), model(x))
    assert other.head.weight is other.embed.weight
    assert other.embed.weight is not model.embed.weight
    assert len(other.ledger) > len(model.ledger)


def test_a_grown_model_computes_what_it_says_also_in_eval_and_after_a_copy() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model = esper_fx.morph(net, sites="1", example_inputs=(torch.randn(2, 4),))
    seed = model.seeds["1"]
    weights = {"down.weight": torch.randn(2, 4), "up.weight": torch.randn(4, 2)}
    body = seed.germinate("low_rank", rank=2).seed.body
    assert body is not None
    seed.prune()
    with esper_fx.configure(embargo_steps=0):
        model(torch.randn(2, 4))
    for _ in range(40):
        model(torch.randn(2, 4))
    weights = {name: torch.randn_like(value) for name, value in body.state_dict().items()}
    seed.germinate("low_rank", rank=2, weights=weights, alpha=0.5)
    assert seed.stage == Stage.ACTIVE
    assert seed.body is not None
    x = torch.randn(3, 4)
    hidden = torch.tanh(net[0](x))
    expected = net[2](hidden + 0.5 * seed.body(hidden))
    for candidate in (model, model.eval(), copy.deepcopy(model)):
        torch.testing.assert_close(candidate(x), expected)


def test_every_visit_of_a_site_gets_its_seed() -> None:
    net = Tied()
    model = esper_fx.morph(net, sites="embed", example_inputs=(torch.randn(2, 4),))
    seed = model.seeds["embed"]
    seed.germinate("low_rank", rank=4)
    assert seed.body is not None
    with torch.no_grad():
        for parameter in seed.body.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    seed.blend(steps=0)
    model(torch.randn(2, 4))

    def grown(x: Tensor) -> Tensor:
        y: Tensor = net.embed(x)
        assert seed.body is not None
        return y + seed.body(y)

    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), net.head(torch.tanh(grown(grown(x)))))


def test_a_model_can_be_saved_and_loaded_into_a_fresh_one() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model = esper_fx.morph(net, sites="0", example_inputs=(torch.randn(2, 4),))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = esper_fx.morph(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), sites="0", example_inputs=(torch.randn(2, 4),))
    assert not any(other.load_state_dict(torch.load(buffer)))
    x = torch.randn(2, 4)
    assert torch.equal(other(x), model(x))


def test_the_seeds_follow_dtype_and_device_of_the_model() -> None:
    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4)), sites="0", example_inputs=(torch.randn(2, 4),))
    model.seeds["0"].germinate("low_rank")
    model.double()
    assert model.state.alpha.dtype == torch.float32
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    assert model(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64


def test_a_seed_germinates_where_and_as_what_the_model_has_become() -> None:
    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4)), sites="0", example_inputs=(torch.randn(2, 4),)).double()
    assert model.seeds["0"].site.dtype == torch.float64
    body = model.seeds["0"].germinate("low_rank").seed.body
    assert body is not None
    assert {parameter.dtype for parameter in body.parameters()} == {torch.float64}
    assert model.to("meta").seeds["0"].site.device.type == "meta"


def test_global_random_numbers_are_not_consumed_by_growing() -> None:
    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4)), sites="0", example_inputs=(torch.randn(2, 4),))
    before = torch.get_rng_state()
    model.seeds["0"].germinate("bottleneck")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_initial_values_depend_on_seed_site_and_number_of_germination_only() -> None:
    def body_of(model: esper_fx.MorphableModel, site: str) -> Tensor:
        model.seeds[site].germinate("low_rank")
        body = model.seeds[site].body
        assert body is not None
        return torch.cat([parameter.detach().flatten() for parameter in body.parameters()])

    def fresh(seed: int) -> esper_fx.MorphableModel:
        return esper_fx.morph(Tied(), sites=["embed", "head"], example_inputs=(torch.randn(2, 4),), seed=seed)

    first = fresh(1)
    assert torch.equal(body_of(first, "head"), body_of(fresh(1), "head"))
    other_seed, other_site = body_of(fresh(2), "head"), body_of(first, "embed")
    again = fresh(1)
    value = body_of(again, "head")
    assert not torch.equal(value, other_seed)
    assert not torch.equal(value, other_site)
    with esper_fx.configure(embargo_steps=0):
        again.seeds["head"].prune()
    assert not torch.equal(value, body_of(again, "head"))


# Bad input: a clear error, before anything changed.


def refused(kind: type[EsperError], builtin: type[Exception], wording: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=wording) as caught:
        call()
    assert isinstance(caught.value, builtin)
    assert isinstance(caught.value, EsperError)


def test_no_site_matches() -> None:
    net = small_cnn().model
    refused(
        SiteError,
        ValueError,
        r"sites='block\.\*' selects no module of this model\. Nearest names: .*blocks\.[01]",
        lambda: esper_fx.morph(net, sites="block.*"),
    )
    refused(SiteError, ValueError, "selects no module", lambda: esper_fx.morph(net, sites=nn.LSTM))
    refused(SiteError, ValueError, "selects no module", lambda: esper_fx.morph(net, sites=lambda node: False))
    refused(SiteError, ValueError, "selects no module", lambda: esper_fx.morph(net, sites=[]))


def test_a_site_whose_value_is_not_floating() -> None:
    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ids = nn.Identity()
            self.embedding = nn.Embedding(8, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.embedding(self.ids(ids))

    net, ids = Ids(), torch.tensor([1, 2])
    wording = r"site 'ids' carries torch.int64 values, but a seed needs a floating tensor; choose another site"
    refused(SiteError, ValueError, wording, lambda: esper_fx.morph(net, sites="ids", example_inputs=(ids,)))
    model = esper_fx.morph(net, sites="ids")
    refused(SiteError, ValueError, wording, lambda: model(ids))


class Recurrent(nn.Module):
    """Its LSTM returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def test_of_a_tuple_the_first_tensor_is_the_site() -> None:
    x = torch.randn(2, 1, 4)
    net = Recurrent()
    model = esper_fx.morph(net, sites="lstm", example_inputs=(x,))
    assert model.seeds["lstm"].site.shape == (2, 1, 4)
    assert torch.equal(model(x), net(x))
    model.seeds["lstm"].germinate("affine", weights={"scale": torch.ones(4), "shift": torch.ones(4)})
    assert torch.allclose(model(x), net(x) * 2 + 1)


def test_a_site_that_is_no_tensor() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": x if x.sum() > 0 else x + 1}

    net = nn.Sequential(Named())
    wording = r"site '0' returns a dict, but a seed needs one floating tensor, or a tuple that begins with one"
    model = esper_fx.morph(net, sites="0")
    refused(SiteError, ValueError, wording, lambda: model(torch.ones(2)))


@pytest.mark.parametrize("part", ["whole", "seed inside"])
def test_a_model_already_morphed(part: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    model = esper_fx.morph(net, sites="0")
    again: nn.Module = model if part == "whole" else nn.ModuleList([nn.Tanh(), model])
    refused(
        MorphError,
        ValueError,
        r"is morphed already; morph the original instead",
        lambda: esper_fx.morph(again, sites="0"),
    )
    esper_fx.morph(net, sites="0")  # the original can be morphed again


def test_something_that_is_no_module_or_cannot_be_traced_or_takes_our_names() -> None:
    refused(MorphError, ValueError, r"morph\(\) needs an nn.Module, not a function", lambda: esper_fx.morph(run, "*"))  # type: ignore[arg-type]

    class Hopeless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    refused(
        MorphError,
        ValueError,
        "no part of Hopeless can be traced: Hopeless cannot be traced symbolically",
        lambda: esper_fx.morph(Hopeless(), sites="*"),
    )

    class Taken(nn.Sequential):
        seeds = 3

    refused(
        MorphError,
        ValueError,
        "Taken has attributes of its own called seeds; rename them first",
        lambda: esper_fx.morph(Taken(nn.Linear(4, 4)), sites="*"),
    )


def test_every_public_name_of_a_morphed_model_is_refused_to_a_network() -> None:
    public = {name for name in vars(esper_fx.MorphableModel) if not name.startswith("_")} - set(dir(nn.Module))
    assert {"state", "graph", "seeds", "settle"} <= public
    for name in public:
        net = nn.Sequential(nn.Linear(4, 4))
        setattr(net, name, "fast")
        with pytest.raises(MorphError, match=f"Sequential has attributes of its own called {name}; rename them first"):
            esper_fx.morph(net, sites="0")


def test_what_selects_nothing_among_several_is_said(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = esper_fx.morph(net, sites=["0", "3", re.compile("1"), nn.Conv2d])
    assert set(model.seeds) == {"0", "1"}
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("sites='3' selects no module of this model. Nearest names: ")
    caplog.clear()
    esper_fx.morph(net, sites="*")
    assert not caplog.records


def test_transforms_of_a_morphed_model_are_no_steps() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model = esper_fx.morph(net, sites="*", example_inputs=(x,))

    def loss(module: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().mean()

    def each(module: nn.Module) -> dict[str, Tensor]:
        gradient = torch.func.grad(partial(loss, module))
        return torch.func.vmap(gradient, in_dims=(None, 0))(dict(module.named_parameters()), x)

    model.seeds["1"].germinate("affine")
    mine, theirs = each(model), each(net)
    assert model.clock == 0
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient)
    model(x)
    assert model.clock == 1
    assert model.seeds["1"].live


@pytest.mark.parametrize(
    ("inputs", "wording"),
    [
        ((torch.randn(2, 5),), "example_inputs do not fit Sequential: RuntimeError: .*5.*4"),
        ((torch.randn(2, 4), 1), "example_inputs do not fit Sequential: TypeError: "),
        ((), "example_inputs do not fit Sequential: TypeError: "),
        ({"wrong": torch.randn(2, 4)}, "example_inputs do not fit Sequential: TypeError: .*wrong"),
        (torch.randn(2, 4), r"example_inputs must be a tuple of arguments, such as \(x,\), not one tensor"),
    ],
)
def test_example_inputs_that_do_not_fit(inputs: Any, wording: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    before = _state_of(net)
    refused(MorphError, ValueError, wording, lambda: esper_fx.morph(net, sites="0", example_inputs=inputs))
    assert _state_of(net) == before


@esper_fx.blueprint("test_morph_wrong_shape", replace=True)
def _wrong_shape(site: esper_fx.SiteSpec) -> nn.Module:
    return nn.Linear(site.features, site.features + 1)


@esper_fx.blueprint("test_morph_wrong_dtype", replace=True)
def _wrong_dtype(site: esper_fx.SiteSpec) -> nn.Module:
    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double() * 0

    return Doubles()


@esper_fx.blueprint("test_morph_not_zero", replace=True)
def _not_zero(site: esper_fx.SiteSpec) -> nn.Module:
    return nn.Linear(site.features, site.features)


def _snapshot(model: esper_fx.MorphableModel, optimizer: torch.optim.Optimizer) -> Any:
    return (
        [model.state.rows(i) for i in range(len(model.seeds))].__repr__(),
        list(model.ledger),
        model.morphology,
        [(s.stage, s.body, s.blueprint, s.live, s.error, s.config) for s in model.seeds.values()],
        [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        list(model.state_dict()),
    )


@pytest.mark.parametrize(
    ("kind", "builtin", "wording", "action"),
    [
        (
            UnknownBlueprintError,
            KeyError,
            r"no blueprint is registered under 'low_rnk': there are affine, .*low_rank.*\(did you mean 'low_rank'\?\)",
            lambda model: model.seeds["0"].germinate("low_rnk"),
        ),
        (
            BlueprintError,
            ValueError,
            r"blueprint 'low_rank' has no parameter 'rnk' \(given rnk=3\): it accepts .*rank",
            lambda model: model.seeds["0"].germinate("low_rank", rnk=3),
        ),
        (
            BlueprintError,
            ValueError,
            r"rank=0 for blueprint 'low_rank': expected a whole number from 1",
            lambda model: model.seeds["0"].germinate("low_rank", rank=0),
        ),
        (
            BlueprintError,
            ValueError,
            r"blueprint 'depthwise_conv' does not fit site '0': .*It fits: .*low_rank",
            lambda model: model.seeds["0"].germinate("depthwise_conv"),
        ),
        (
            BlueprintError,
            ValueError,
            r"'test_morph_wrong_shape' built for site '0' maps an input of shape \[2, 4\] to one of shape \[2, 5\]",
            lambda model: model.seeds["0"].germinate("test_morph_wrong_shape"),
        ),
        (
            BlueprintError,
            ValueError,
            r"maps an input of dtype torch.float32 to one of dtype torch.float64: expected the same dtype",
            lambda model: model.seeds["0"].germinate("test_morph_wrong_dtype"),
        ),
        (
            BlueprintError,
            ValueError,
            r"is not zero at birth .*zero-initialise its last layer",
            lambda model: model.seeds["0"].germinate("test_morph_not_zero"),
        ),
        (
            BlueprintError,
            ValueError,
            r"weights for blueprint 'low_rank' at site '0' do not fit: .*",
            lambda model: model.seeds["0"].germinate("low_rank", weights={"nothing": torch.ones(1)}),
        ),
        (
            LifecycleError,
            RuntimeError,
            r"the seed at '2' is INCUBATING and cannot become GERMINATING: from INCUBATING it can become BLENDING",
            lambda model: model.seeds["2"].germinate("low_rank"),
        ),
        (
            LifecycleError,
            RuntimeError,
            r"the seed at '0' is DORMANT and cannot become BLENDING: .*call germinate\(\) first",
            lambda model: model.seeds["0"].blend(),
        ),
        (
            LifecycleError,
            RuntimeError,
            r"the seed at '0' is DORMANT and cannot become EMBARGOED",
            lambda model: model.seeds["0"].prune(),
        ),
        (
            LifecycleError,
            RuntimeError,
            r"the seed at '2' is INCUBATING and cannot become FOSSILIZED: .*call blend\(\) first",
            lambda model: model.seeds["2"].fossilize(),
        ),
        (EsperError, ValueError, "schedule", lambda model: model.seeds["2"].blend(schedule="sudden")),
        (EsperError, ValueError, "steps", lambda model: model.seeds["2"].blend(steps=-1)),
        (EsperError, ValueError, "to=nan", lambda model: model.seeds["2"].blend(to=float("nan"))),
        (EsperError, ValueError, "alpha", lambda model: model.seeds["0"].germinate("low_rank", alpha=float("inf"))),
        (
            OptimizerError,
            ValueError,
            r"an optimizer \(SGD\) is attached to this model already; call detach\(\) on what attach\(\) returned first",
            lambda model: esper_fx.attach(torch.optim.Adam(model.parameters()), model),
        ),
    ],
)
def test_a_refused_action_changes_nothing(
    kind: type[EsperError], builtin: type[Exception], wording: str, action: Callable[[Any], Any]
) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model = esper_fx.morph(net, sites=["0", "2"], example_inputs=(torch.randn(2, 4),))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    esper_fx.attach(optimizer, model)
    model.seeds["2"].germinate("low_rank", rank=2)
    assert model.seeds["2"].stage == Stage.INCUBATING
    x = torch.randn(2, 4)
    before, output, random = _snapshot(model, optimizer), model(x), torch.get_rng_state()
    refused(kind, builtin, wording, lambda: action(model))
    assert _snapshot(model, optimizer) == before
    assert torch.equal(model(x), output)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_foreign_optimizer_or_model() -> None:
    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4)), sites="0")
    foreign = torch.optim.SGD(nn.Linear(4, 4).parameters(), lr=0.1)
    refused(
        OptimizerError,
        ValueError,
        r"this SGD holds none of the model's parameters; make it from model.parameters\(\)",
        lambda: esper_fx.attach(foreign, model),
    )
    refused(
        OptimizerError,
        ValueError,
        r"attach\(\) needs a morphed model, not a Linear; call esper_fx.morph first",
        lambda: esper_fx.attach(foreign, nn.Linear(4, 4)),  # type: ignore[arg-type]
    )
    refused(
        OptimizerError,
        ValueError,
        r"attach\(\) needs a torch.optim.Optimizer, not a dict",
        lambda: esper_fx.attach({}, model),  # type: ignore[arg-type]
    )
    assert model.growth.attachment is None
    assert len(foreign.param_groups) == 1


def test_functions_called_on_a_values_result_are_seeded_too() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.layer(x)).mean(-1)

    net = Functional()
    model = esper_fx.morph(net, sites=lambda node: node.target is F.gelu, example_inputs=(torch.randn(2, 4),))
    (seed,) = model.seeds.values()
    assert seed.name == "gelu"
    seed.germinate("low_rank", rank=2)
    assert seed.body is not None
    nn.init.ones_(next(reversed(list(seed.body.parameters()))))
    x = torch.randn(2, 4)
    hidden = F.gelu(net.layer(x))
    torch.testing.assert_close(model(x), (hidden + seed.body(hidden)).mean(-1))
